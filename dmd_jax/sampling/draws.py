"""Latents and labels of images and pairs, by index."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.method.randomness import Role, key_data, role_key

# By which images of a seed are drawn; what is kept of a seed's images names them beside it.
DRAWS = {role.name.lower(): int(role) for role in (Role.SAMPLE_LATENTS, Role.SAMPLE_LABELS)}


def draw_latents(
    seed: int,
    start: int,
    stop: int,
    sample_shape: tuple[int, ...],
    *,
    role: Role = Role.SAMPLE_LATENTS,
) -> np.ndarray:
    """z ~ N(0, I) for the images start..stop-1, float32 [stop - start, *sample_shape].

    Args:
      role: Role.PAIR_LATENTS for pairs. Image i's latent is a function of (seed, i, role), so that
        a generator is never judged by the latents that it was trained on.
    """
    indices = jnp.arange(start, stop, dtype=jnp.int32)
    return np.asarray(_latents(key_data(seed), indices, sample_shape, role))


def draw_labels(
    seed: int, start: int, stop: int, num_classes: int, *, role: Role = Role.SAMPLE_LABELS
) -> np.ndarray:
    """Labels uniform over the classes for the images start..stop-1, int32; 0 without classes.

    Args:
      role: Role.PAIR_LABELS for pairs, as for `draw_latents`.
    """
    indices = jnp.arange(start, stop, dtype=jnp.int32)
    return np.asarray(_labels(key_data(seed), indices, max(num_classes, 1), role))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _latents(base, indices, sample_shape, role):
    def draw(index):
        return jax.random.normal(role_key(base, index, role), sample_shape, jnp.float32)

    return jax.vmap(draw)(indices)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _labels(base, indices, num_classes, role):
    def draw(index):
        return jax.random.randint(role_key(base, index, role), (), 0, num_classes, jnp.int32)

    return jax.vmap(draw)(indices)
