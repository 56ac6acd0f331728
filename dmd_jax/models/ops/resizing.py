"""Resizing as networks were built with it: bilinear in two conventions, and PIL's bicubic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


@jax.named_scope("bilinear")
def bilinear(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images [B, H, W, C] resized to (height, width), pixels' centres at half-integers.

    Nothing is antialiased. This is PyTorch's interpolate(mode="bilinear", align_corners=False).
    """
    shape = (images.shape[0], *size, images.shape[-1])
    # Its products are at the highest precision, which is jax.image's default.
    return jax.image.resize(images, shape, "linear", antialias=False)


def bilinear_from_the_corner(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images [B, H, W, C] resized to (height, width), row i taken at i H / height of the input.

    This is TensorFlow 1's resize_bilinear(align_corners=False), without antialiasing. Beyond the
    last row lies itself.
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


def pil_bicubic(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bytes [B, H, W, C] resized to (height, width) as clean-fid has it, float32 in 0 to 255.

    PIL's bicubic, antialiased, on floats, so that nothing is rounded to bytes in between; what
    overshoots is clipped (arXiv 2104.11222, as released).
    """
    height, width = size

    def resized(image: np.ndarray) -> np.ndarray:
        channels = [
            Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
            for channel in np.ascontiguousarray(np.moveaxis(image, -1, 0), np.float32)
        ]
        return np.stack(channels, axis=-1)

    # Pillow lets go of the interpreter while it resizes.
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(resized, images))).clip(0, 255)
