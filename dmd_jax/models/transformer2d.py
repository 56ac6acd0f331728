"""The transformer of Stable Diffusion's U-Net: self-attention, attention to the text, GEGLU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.models.layers import GroupNorm, conv, gelu, layer_norm
from dmd_jax.models.unet2d_blocks import project_and_attend

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
        h = GroupNorm(_EPSILON, self.groups, name="norm")(x)
        h = self._project(h, "proj_in").reshape(x.shape[0], -1, x.shape[-1])
        h = TransformerBlock(self.num_heads, dtype=self.dtype, name="transformer_blocks_0")(
            h, context
        )
        return x + self._project(h.reshape(x.shape), "proj_out")

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        if self.use_linear_projection:
            return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)(x)
        return conv(x.shape[-1], 1, name=name, dtype=self.dtype)(x)


class TransformerBlock(nn.Module):
    """Three residual branches, each behind a layer norm: to itself, to the text, feed-forward."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, L, C], context [B, S, D] -> [B, L, C]."""
        h = layer_norm(name="norm1", dtype=self.dtype)(x)
        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn1")(h, h)
        h = layer_norm(name="norm2", dtype=self.dtype)(x)
        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn2")(h, context)
        h = layer_norm(name="norm3", dtype=self.dtype)(x)
        return x + FeedForward(dtype=self.dtype, name="ff")(h)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values have no biases."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x [B, L, C], context [B, S, D] -> [B, L, C]."""
        return project_and_attend(
            x, context, num_heads=self.num_heads, use_bias=False, dtype=self.dtype
        )


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202) to four times the channels and back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., C]."""
        h = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class GEGLU(nn.Module):
    """a gelu(b) for a and b linear in x, with the exact GELU, b Phi(b)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., C] -> [..., features]."""
        h, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, -1)
        return (h * gelu(gate)).astype(self.dtype)
