"""The transformer of Stable Diffusion's U-Net: self-attention, attention to the text, GEGLU."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.models.ops.layers import XAVIER, GroupNorm, gelu, layer_norm
from dmd_jax.models.ops.products import linear, product_in, rounded_operands
from dmd_jax.models.stable_diffusion.unet2d_blocks import project_and_attend

# Of the GroupNorm before the transformer, whatever norm_eps the residual blocks have.
_EPSILON = 1e-6


class Transformer2D(nn.Module):
    """One transformer block over an image's pixels, between two projections, added to the image."""

    num_heads: int
    groups: int
    use_linear_projection: bool = False  # proj_in and proj_out are matrices, not 1x1 convolutions
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, H, W, C], context [B, S, D] -> [B, H, W, C]."""
        project = linear if self.use_linear_projection else PixelConv
        project = functools.partial(project, x.shape[-1], dtype=self.dtype, result=x.dtype)
        rounds = self.dtype == jnp.bfloat16
        h = GroupNorm(_EPSILON, self.groups, one_pass=rounds, name="norm")(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        h = project(name="proj_in")(h)
        h = TransformerBlock(self.num_heads, dtype=self.dtype, name="transformer_blocks_0")(
            h, context
        )
        return x + project(name="proj_out")(h).reshape(x.shape)


class PixelConv(nn.Module):
    """A 1x1 convolution of pixels in a row.

    As a product of matrices, whose result a TPU lays out as attention wants it; what a convolution
    returns it would copy.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    result: jnp.dtype | None = None  # of what is returned, see `product_in`; None is `dtype`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, L, C] -> [B, L, features]."""
        kernel = self.param(
            "kernel", XAVIER.hidden, (1, 1, x.shape[-1], self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = rounded_operands(x, kernel, bias, dtype=self.dtype, result=self.result)
        return product_in(jnp.matmul, x, kernel[0, 0], self.result) + bias


class TransformerBlock(nn.Module):
    """Three residual branches, each behind a layer norm: to itself, to the text, feed-forward."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, L, C], context [B, S, D] -> [B, L, C], in x's dtype."""
        attention = functools.partial(Attention, self.num_heads, dtype=self.dtype, result=x.dtype)
        h = layer_norm(name="norm1", dtype=self.dtype)(x)
        x = x + attention(name="attn1")(h, h)
        h = layer_norm(name="norm2", dtype=self.dtype)(x)
        x = x + attention(name="attn2")(h, context)
        h = layer_norm(name="norm3", dtype=self.dtype)(x)
        return x + FeedForward(dtype=self.dtype, result=x.dtype, name="ff")(h)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values have no biases."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    result: jnp.dtype = jnp.float32  # of what is returned, see `product_in`

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, L, C], context [B, S, D] -> [B, L, C]."""
        return project_and_attend(
            x,
            context,
            num_heads=self.num_heads,
            use_bias=False,
            dtype=self.dtype,
            result=self.result,
        )


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202) to four times the channels and back."""

    dtype: jnp.dtype = jnp.float32
    result: jnp.dtype = jnp.float32  # of what is returned, see `product_in`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., C]."""
        h = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return linear(x.shape[-1], dtype=self.dtype, result=self.result, name="net_2")(h)


class GEGLU(nn.Module):
    """a gelu(b) for a and b linear in x, with the exact GELU, b Phi(b)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., features]."""
        h, gate = TwoDense(self.features, dtype=self.dtype, name="proj")(x)
        return (h * gelu(gate)).astype(self.dtype)


class TwoDense(nn.Module):
    """The two halves of a Dense layer's result, each by a product of its own.

    The gradients of halves would be written side by side before they are used.
    """

    features: int  # of a half
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x [..., C] -> two of [..., features]."""
        shape = (x.shape[-1], 2 * self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        halves = zip(jnp.split(kernel, 2, axis=1), jnp.split(bias, 2))
        return [x @ half_kernel + half_bias for half_kernel, half_bias in halves]
