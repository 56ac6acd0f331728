"""Bilinear resizing without antialiasing, in the two conventions that networks were built with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def bilinear(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images [B, H, W, C] resized to (height, width), pixels' centres at half-integers.

    This is PyTorch's interpolate(mode="bilinear", align_corners=False).
    """
    shape = (images.shape[0], *size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=False)


def bilinear_from_the_corner(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images [B, H, W, C] resized to (height, width), row i taken at i H / height of the input.

    This is TensorFlow 1's resize_bilinear(align_corners=False). Beyond the last row lies itself.
    """
    for axis, length in zip((1, 2), size):
        where = jnp.arange(length) * (images.shape[axis] / length)
        low = jnp.floor(where).astype(jnp.int32)
        high = jnp.minimum(low + 1, images.shape[axis] - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = length
        weight = (where - low).reshape(shape)
        images = jnp.take(images, low, axis) * (1 - weight) + jnp.take(images, high, axis) * weight
    return images
