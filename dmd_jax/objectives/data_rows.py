"""Rows of data: what objectives read of each source, and the conditions of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.method.types import Generate, Params
from dmd_jax.objectives.objective import Batch, Need, need
from dmd_jax.teachers.teacher import Frozen, Teacher


def cond_of(teacher: Teacher, frozen: Frozen, rows: Mapping[str, jax.Array]) -> Any:
    """The condition of rows of data, which may have been encoded before the step."""
    return rows["cond"] if "cond" in rows else teacher.encode(frozen, rows)


def fresh_cond(teacher: Teacher, key: jax.Array, frozen: Frozen, batch: Batch, count: int) -> Any:
    """The conditions of `count` fresh latents: of the batch's prompts, or drawn."""
    if teacher.draw_tokens is None:
        return cond_of(teacher, frozen, batch["prompts"])
    return teacher.encode(frozen, teacher.draw_tokens(key, count))


def image_needs(teacher: Teacher, count: int) -> dict[str, Need]:
    """`count` real images with their tokens, of the source "images"."""
    image = jax.ShapeDtypeStruct(teacher.sample_shape, jnp.float32)
    return {"images": need(count, {"x0": image} | dict(teacher.tokens))}


def pair_needs(teacher: Teacher, count: int, *, every: int = 1) -> dict[str, Need]:
    """`count` pairs with their tokens, of the source "pairs", used on each n-th step."""
    image = jax.ShapeDtypeStruct(teacher.sample_shape, jnp.float32)
    pair = {"z_ref": image, "y_ref": image} | dict(teacher.tokens)
    return {"pairs": need(count, pair, every=every)}


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
