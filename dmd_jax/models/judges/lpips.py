"""LPIPS and VGG16's features as pure functions of parameters and images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_precision
from dmd_jax.models.ops import folding
from dmd_jax.models.ops.resizing import bilinear

# VGG16 (arXiv 1409.1556): the width and the number of the 3x3 convolutions of each block.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# Of a window, and of the two pixels of a folded one.
POOLINGS = {
    "average": (nn.avg_pool, lambda a, b: (a + b) / 2),
    "max": (nn.max_pool, jnp.maximum),
}
# ImageNet's mean and standard deviation of each channel, for images in [-1, 1].
_MEAN = 2 * np.array([0.485, 0.456, 0.406], np.float32) - 1
_STD = 2 * np.array([0.229, 0.224, 0.225], np.float32)
_SMALLEST = 2 ** (len(BLOCKS) - 1)


def lpips_template() -> dict[str, Any]:
    """The shapes of LPIPS's parameters, float32.

    Returns:
      {"vgg16": {"conv1_1": {"kernel" [3, 3, in, out], "bias" [out]}, ...}, "heads": {"block1":
      [64], ...}}: VGG16's convolutions, and a weight for each channel of each block's output.
    """
    vgg16, heads, inputs = {}, {}, 3
    for block, (width, count) in enumerate(BLOCKS, 1):
        for number in range(1, count + 1):
            vgg16[f"conv{block}_{number}"] = {
                "kernel": jax.ShapeDtypeStruct((3, 3, inputs, width), jnp.float32),
                "bias": jax.ShapeDtypeStruct((width,), jnp.float32),
            }
            inputs = width
        heads[f"block{block}"] = jax.ShapeDtypeStruct((width,), jnp.float32)
    return {"vgg16": vgg16, "heads": heads}


def lpips(
    params: Any,
    x: jax.Array,
    y: jax.Array,
    *,
    pooling: str = "average",
    resolution: int | None = 224,
    dtype: Any = None,
    precision: str = "highest",
) -> jax.Array:
    """The perceptual distance of pairs of images, LPIPS v0.1 with VGG16 (arXiv 1801.03924).

    The activations at the end of each of VGG16's five blocks are scaled to unit length at each
    position; their squared differences are weighted by channel, averaged over positions and
    summed. Its gradient is zero, not NaN, where x equals y and where a position has no
    activation.

    Args:
      params: of the shapes of `lpips_template`.
      x, y: images [B, H, W, 3] in [-1, 1].
      pooling: "max", as VGG16 was trained and as the standard LPIPS has it, or "average", as the
        code that DMD's regression loss follows.
      resolution: both images are resized bilinearly to this height and width; None leaves them.
      dtype: of the convolutions and their activations; None is the images', float32 at least.
        Images are resized and activations compared in float32 whatever it is.
      precision: "highest", "high" or "default", of float32 convolutions (see method.precision).

    Returns:
      [B], zero for equal images; float32, or float64 of float64 images and parameters.

    Raises:
      UserError: images without three channels, of differing shapes or too small; an unknown
        pooling.
    """
    if x.shape != y.shape:
        raise UserError(f"LPIPS of images of shapes {x.shape} and {y.shape}; expected equal shapes")
    with at_precision(precision):
        of_x, of_y = (
            _blocks(params["vgg16"], images, pooling, resolution, dtype) for images in (x, y)
        )
    total = 0.0
    for block, (a, b) in enumerate(zip(of_x, of_y), 1):
        total += _of_block(a, b, params["heads"][f"block{block}"])
    return total


def vgg16_features(params: Any, x: jax.Array, *, resolution: int | None = 224) -> jax.Array:
    """VGG16's last convolutional activations (relu5_3, max pooling), averaged over positions.

    Computed in full float32 on every device.

    Args:
      params: of the shapes of `lpips_template`; the heads have no influence.
      x: images [B, H, W, 3] in [-1, 1].
      resolution: images are resized bilinearly to this height and width; None leaves them.

    Returns:
      float32 [B, 512].

    Raises:
      UserError: images without three channels or too small.
    """
    with at_precision("highest"):
        return _blocks(params["vgg16"], x, "max", resolution)[-1].mean(axis=(1, 2))


def _blocks(
    vgg16: Any, images: jax.Array, pooling: str, resolution: int | None, dtype: Any = None
) -> list[jax.Array]:
    """The activations at the end of each block, [B, H, W, C] each, or folded."""
    if pooling not in POOLINGS:
        raise UserError(f"LPIPS pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"VGG16 got images of shape {images.shape}; expected [B, H, W, 3], three channels"
        )
    side = resolution or min(images.shape[1:3])
    if side < _SMALLEST:
        raise UserError(f"VGG16 got images of {side} pixels a side; expected at least {_SMALLEST}")
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    if resolution is not None:
        x = bilinear(x, (resolution, resolution))
    x = ((x - _MEAN) / _STD).astype(dtype or x.dtype)
    folded = folding.pays(x.shape[2], BLOCKS[0][0])
    x = folding.fold(x) if folded else x
    outputs = []
    for block, (_, count) in enumerate(BLOCKS, 1):
        if block > 1:
            x = _pool(x, pooling, folded)
            folded = False
        for number in range(1, count + 1):
            layer = vgg16[f"conv{block}_{number}"]
            x = folding.convolve(x, layer["kernel"], folded=folded)
            x = nn.relu(folding.add_bias(x, layer["bias"]))
        outputs.append(x)
    return outputs


def _pool(x: jax.Array, pooling: str, folded: bool) -> jax.Array:
    """Windows of 2x2 pixels; of a folded image [B, H, W/2, 2C] -> [B, H/2, W/2, C]."""
    pool, of_two = POOLINGS[pooling]
    if folded:
        return of_two(*jnp.split(pool(x, (2, 1), strides=(2, 1)), 2, axis=-1))
    return pool(x, (2, 2), strides=(2, 2))


def _of_block(a: jax.Array, b: jax.Array, head: jax.Array) -> jax.Array:
    """[B], the distance of activations [B, H, W, C] or folded, weighted by head [C]."""
    pixels, total = a.shape[-1] // head.size, 0.0
    for one, other in zip(*(jnp.split(x, pixels, axis=-1) for x in (a, b))):
        difference = jnp.square(_unit_length(one) - _unit_length(other))
        total += jnp.mean(jnp.sum(difference * head, axis=-1), axis=(1, 2))
    return total / pixels


def _unit_length(x: jax.Array) -> jax.Array:
    """Each position's channels divided by their norm plus 1e-10, as the reference has it."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The square root's slope at zero is infinite: there the norm is a constant instead.
    zero = squared == 0
    return x / (jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared))) + 1e-10)
