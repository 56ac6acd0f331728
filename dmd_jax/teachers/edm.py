"""Teachers of pixels, with class labels or without a condition: EDM's networks and the MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dmd_jax.models import Denoiser
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens


def edm_teacher(denoiser: Denoiser) -> Teacher:
    """The teacher around a network whose condition is a label, or None.

    Frozen arrays: "network". Tokens: "label" int32 [B], where the network has classes.
    """
    count = denoiser.num_classes

    def encode(frozen: Frozen, tokens: Tokens) -> jax.Array | None:
        return tokens["label"] if count else None

    def draw_tokens(key: jax.Array, rows: int) -> Tokens:
        return {"label": jax.random.randint(key, (rows,), 0, count, jnp.int32)} if count else {}

    return Teacher(
        denoise=denoiser.denoise,
        schedule=denoiser.schedule,
        sample_shape=denoiser.sample_shape,
        tokens={"label": jax.ShapeDtypeStruct((), jnp.int32)} if count else {},
        encode=encode,
        null=lambda frozen: None,
        decode=lambda frozen, x0: x0,
        draw_tokens=draw_tokens,
    )
