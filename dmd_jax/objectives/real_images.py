"""What objectives that learn from real images alone have in common: their rows and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.method.types import Generate, Params
from dmd_jax.objectives.conditions import cond_of
from dmd_jax.objectives.objective import Batch, Need, need
from dmd_jax.teachers.teacher import Frozen, Teacher


def image_needs(teacher: Teacher, count: int) -> dict[str, Need]:
    """`count` real images with their tokens, of the source "images"."""
    image = jax.ShapeDtypeStruct(teacher.sample_shape, jnp.float32)
    return {"images": need(count, {"x0": image} | dict(teacher.tokens))}


def real_rows(teacher: Teacher, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """The images of a batch as "x0" [B, ...], and their "cond"."""
    images = batch["images"]
    return {"x0": images["x0"], "cond": cond_of(teacher, frozen, images)}


def samples_of(
    generate: Generate,
    teacher: Teacher,
    key: jax.Array,
    players: Mapping[str, Params],
    frozen: Frozen,
    batch: Batch,
    count: int,
) -> dict[str, jax.Array]:
    """One-step samples of the generator, of the conditions of the batch's first source."""
    rows = next(iter(batch.values()))
    z = jax.random.normal(key, (count, *teacher.sample_shape), jnp.float32)
    x = generate(players["generator"], z, cond_of(teacher, frozen, rows))
    return {"samples": teacher.decode(frozen, x)}
