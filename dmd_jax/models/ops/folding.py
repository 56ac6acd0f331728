"""3x3 convolutions of few channels, with two pixels side by side as one of twice the channels.

A TPU keeps and multiplies channels 128 at a time: of 64, half of that is idle. The kernel of folded
images is twice as wide and half of it zeros; even so, by the TPU compiler, it takes a third of the
time, and the images half of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dmd_jax.parallel.sharding import platform_in_use

_LANES = 128


def pays(width: int, channels: int) -> bool:
    """Whether images of that width and of that many channels are better folded."""
    return platform_in_use() == "tpu" and width % 2 == 0 and 2 * channels <= _LANES


def fold(x: jax.Array) -> jax.Array:
    """x [B, H, W, C] -> [B, H, W/2, 2C]."""
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])


def unfold(x: jax.Array) -> jax.Array:
    """x [B, H, W/2, 2C] -> [B, H, W, C]."""
    return x.reshape(*x.shape[:2], 2 * x.shape[2], x.shape[3] // 2)


def folded_kernel(
    kernel: jax.Array, taps: Sequence[int], reads: Callable[[int, int, int], bool]
) -> jax.Array:
    """[H, 3, C, F] of images -> [H, taps, 2C, 2F] of folded ones.

    Args:
      taps: the positions of the input's pairs relative to the output's.
      reads: (tap, pixel 0 or 1 of that pair, pixels to the right of the output pair's first) ->
        whether that is the input's pixel at that place.
    """

    def part(tap: int, pixel: int, output: int) -> jax.Array:
        columns = (kernel[:, i] for i in range(3) if reads(tap, pixel, output + i - 1))
        return sum(columns, start=jnp.zeros_like(kernel[:, 0]))

    both = (0, 1)
    of_taps = [jnp.block([[part(tap, p, q) for q in both] for p in both]) for tap in taps]
    return jnp.stack(of_taps, axis=1)


def convolve(x: jax.Array, kernel: jax.Array, *, folded: bool = False, **wanted: Any) -> jax.Array:
    """A 3x3 convolution with one zero at each edge, in x's dtype.

    Args:
      x: [B, H, W, C], or folded [B, H, W/2, 2C]. kernel: [3, 3, C, F].
      wanted: preferred_element_type, of another dtype.

    Returns:
      [B, H, W, F], folded as x is.
    """
    kernel = kernel.astype(x.dtype)
    if folded:
        kernel = folded_kernel(kernel, (-1, 0, 1), lambda tap, p, right: 2 * tap + p == right)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **wanted)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., F], or folded [..., 2F], and bias [F] -> the sum, in x's dtype."""
    return x + jnp.tile(bias.astype(x.dtype), x.shape[-1] // bias.size)


class FoldableConv(nn.Module):
    """`convolve` and a bias, whose parameters are those of images whether folded or not."""

    features: int
    folded: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, features], or both folded."""
        shape = (3, 3, x.shape[-1] // (1 + self.folded), self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return add_bias(convolve(x.astype(self.dtype), kernel, folded=self.folded), bias)
