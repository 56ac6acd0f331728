"""Images enlarged to twice their size and convolved."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dmd_jax.models.ops.folding import add_bias, convolve, folded_kernel
from dmd_jax.models.ops.products import product_in
from dmd_jax.parallel.sharding import gathered, platform_in_use


class DoublingConv(nn.Module):
    """A 3x3 convolution of images enlarged by their nearest neighbours, zero-padded by one."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    folded: bool = False  # the images, before and after: see `folding`
    dtype: jnp.dtype = jnp.float32
    result: jnp.dtype | None = None  # of what is returned, see `product_in`; None is `dtype`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, 2H, 2W, features], or both folded."""
        shape = (3, 3, x.shape[-1] // (1 + self.folded), self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        # A TPU takes half the time for it as one convolution, by its compiler; a CPU ten times
        # longer for the gradient.
        if self.folded or platform_in_use() == "tpu":
            product = functools.partial(as_one, folded=self.folded)
        else:
            product = one_by_one
        y = product_in(product, x.astype(self.dtype), kernel, self.result)
        if not self.use_bias:
            return y
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


def one_by_one(x: jax.Array, kernel: jax.Array, **wanted: Any) -> jax.Array:
    """x [B, H, W, C] enlarged, and then convolved by a kernel [3, 3, C, F]; in x's dtype.

    wanted: preferred_element_type, of another one.
    """
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    return convolve(x, kernel, **wanted)


def as_one(x: jax.Array, kernel: jax.Array, *, folded: bool = False, **wanted: Any) -> jax.Array:
    """What `one_by_one` returns, without writing the enlarged image; of folded images as well.

    To repeat each pixel twice along both axes is to convolve the image with zeros between its
    pixels by 2x2 ones. That and the kernel's make one convolution of 4x4.
    """
    kernel = _and_repeated(kernel, axis=0)
    if folded:
        # Zeros between pairs put the pair of pixel i, which becomes the output's pair i, at i - p.
        kernel = folded_kernel(kernel, (-2, -1, 0, 1), lambda tap, p, right: tap + p == right // 2)
    else:
        kernel = _and_repeated(kernel, axis=1)
    return lax.conv_general_dilated(
        x,
        gathered(kernel.astype(x.dtype)),
        (1, 1),
        [(2, 2)] * 2,
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **wanted,
    )


def _and_repeated(kernel: jax.Array, axis: int) -> jax.Array:
    """A kernel convolved with two ones along an axis."""
    before, after = ([(0, 0)] * kernel.ndim for _ in range(2))
    before[axis], after[axis] = (1, 0), (0, 1)
    return jnp.pad(kernel, before) + jnp.pad(kernel, after)
