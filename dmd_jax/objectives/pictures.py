"""What a loss on samples looks like: its arrays as images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.method.schedules import expand
from dmd_jax.objectives.draws import Draws
from dmd_jax.teachers.teacher import Frozen, Teacher


def one_by_one(of_rows: Callable[[Any], Any], rows: Any) -> Any:
    """`of_rows` of a tree of arrays [N, ...], a row at a time.

    Attention on large latents needs gigabytes for a few of them.
    """

    def of_one(example: Any) -> Any:
        found = of_rows(jax.tree.map(lambda leaf: leaf[None], example))
        return jax.tree.map(lambda leaf: leaf[0], found)

    return jax.lax.map(of_one, rows)


def shown(
    pictures: Mapping[str, jax.Array], draws: Draws, teacher: Teacher, frozen: Frozen
) -> dict[str, jax.Array]:
    """What a loss gives as pictures, as images [B, H, W, C].

    Args:
      pictures: samples by name, with "x" among them. draws: those of "x_t".
    """
    pictures = dict(pictures)
    if "x_t" in pictures:
        # To the brightness of an image, whatever the noise's scale.
        spread = jnp.hypot(draws.level.alpha, draws.level.sigma)
        pictures["x_t"] = pictures["x_t"] / expand(spread, pictures["x_t"])
    images = {
        name: teacher.decode(frozen, picture)
        for name, picture in pictures.items()
        if name != "gradient"
    }
    if "gradient" in pictures:
        images["gradient"] = _beside(pictures["gradient"], images["x"])
    return images


def _beside(gradient: jax.Array, images: jax.Array) -> jax.Array:
    """A gradient on latents at the size and with the channels of their images."""
    factor = images.shape[1] // gradient.shape[1]
    gradient = jnp.repeat(jnp.repeat(gradient, factor, axis=1), factor, axis=2)
    return gradient[..., : images.shape[-1]]
