"""Images enlarged to twice their size and convolved."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dmd_jax.sharding import platform_in_use


class DoublingConv(nn.Module):
    """A 3x3 convolution of images enlarged by their nearest neighbours, zero-padded by one."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, 2H, 2W, features]."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        # A TPU takes half the time for it as one convolution, by its compiler; a CPU ten times
        # longer for the gradient.
        enlarge_and_convolve = as_one if platform_in_use() == "tpu" else one_by_one
        y = enlarge_and_convolve(x.astype(self.dtype), kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(self.dtype)


def one_by_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C] enlarged, and then convolved by a kernel [3, 3, C, F]; in x's dtype."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return _convolve(x, kernel.astype(x.dtype), padding=1)


def as_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `one_by_one` returns, without writing the enlarged image.

    To repeat each pixel twice along both axes is to convolve the image with zeros between its
    pixels by 2x2 ones. That and the kernel's make one convolution of 4x4.
    """
    shifts = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in (0, 1) for j in (0, 1)]
    kernel = sum(jnp.pad(kernel, shift) for shift in shifts)
    return _convolve(x, kernel.astype(x.dtype), padding=2, lhs_dilation=(2, 2))


def _convolve(x: jax.Array, kernel: jax.Array, *, padding: int, **options) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    edges = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (1, 1), edges, dimension_numbers=numbers, **options)
