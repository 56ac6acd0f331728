"""The blocks that Stable Diffusion's U-Net and its autoencoder are both made of.

Modules are named as in PyTorch diffusers, whose parameters they take (see convert.torch_layout).
Parameters are float32; `dtype` is what convolutions and matmuls compute in, norms are float32. A
block's residual stream has the dtype of the images that it is given: the U-Net's is float32 where
it computes in bfloat16, and is rounded where a product takes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.method.precision import at_precision
from dmd_jax.models.ops.attention import attend
from dmd_jax.models.ops.doubling import DoublingConv
from dmd_jax.models.ops.layers import XAVIER, GroupNorm, conv, dense
from dmd_jax.models.ops.products import product_in, rounded_operands

Size = tuple[int, int]  # height, width
# Makes a module that is given its fields and its name.
Block = Callable[..., nn.Module]


class ResnetBlock2D(nn.Module):
    """Residual block: norm, SiLU, convolution twice; the embedding is added between."""

    features: int
    groups: int
    epsilon: float  # of the norms
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C], emb [B, E] or None -> [B, H, W, features]."""
        rounds = self.dtype == jnp.bfloat16
        norm = functools.partial(GroupNorm, self.epsilon, self.groups, one_pass=rounds)
        convolve = functools.partial(conv, self.features, 3, dtype=self.dtype, result=x.dtype)
        h = nn.silu(norm(name="norm1")(x))
        h = convolve(name="conv1")(h)
        if emb is not None:
            shift = dense(self.features, name="time_emb_proj")(nn.silu(emb)).astype(h.dtype)
            h = h + shift[:, None, None, :]
        h = nn.silu(norm(name="norm2")(h))
        h = convolve(name="conv2")(h)
        if x.shape[-1] != self.features:
            # All of the stream goes through this product, which is small: a fiftieth of Stable
            # Diffusion's. "high" is enough for what is rounded to bfloat16 before and behind.
            with at_precision("high") if x.dtype != self.dtype else nullcontext():
                x = conv(self.features, 1, name="conv_shortcut", dtype=x.dtype)(x)
        return x + h


class Downsample2D(nn.Module):
    """A convolution of stride 2."""

    features: int
    padding_before: int  # zeros above and on the left; there is one below and on the right
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', features]: half the size, rounded up (padding 1) or down.

        The U-Net pads by (1, 1), the autoencoder by (0, 1); "SAME" is neither for every size.
        """
        strided = conv(
            self.features,
            3,
            name="conv",
            dtype=self.dtype,
            result=x.dtype,
            init=nn.initializers.lecun_normal(),
            strides=2,
            padding=[(self.padding_before, 1)] * 2,
        )
        return strided(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement and a convolution."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: Size | None = None) -> jax.Array:
        """x [B, H, W, C] -> [B, *size, features]; twice the size where `size` is None."""
        double = (2 * x.shape[1], 2 * x.shape[2])
        options = {"name": "conv", "dtype": self.dtype, "result": x.dtype}
        if size in (None, double):
            return DoublingConv(self.features, kernel_init=XAVIER.hidden, **options)(x)
        return conv(self.features, 3, **options)(nearest(x, size))


def nearest(x: jax.Array, size: Size) -> jax.Array:
    """Images [B, H, W, C] enlarged: row i of the result is row floor(i H / height) of x.

    PyTorch's nearest; jax.image.resize takes the row at the pixel's centre, which is another one
    where the size is not a multiple.
    """
    for axis, length in zip((1, 2), size):
        x = jnp.take(x, jnp.arange(length) * x.shape[axis] // length, axis=axis)
    return x


class DownBlock2D(nn.Module):
    """A level of an encoder: residual blocks, each with attention behind it or without."""

    features: int
    layers: int
    resnet: Block
    attention: Block | None  # takes (x, context)
    downsample: Block | None  # None: the last level

    @nn.compact
    def __call__(
        self, x: jax.Array, emb: jax.Array | None = None, context: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the level's output and the activations that the decoder is given."""
        skips = []
        for index in range(self.layers):
            x = self.resnet(self.features, name=f"resnets_{index}")(x, emb)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{index}")(x, context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(self.features, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock2D(nn.Module):
    """The middle: a residual block, attention, a residual block."""

    features: int
    resnet: Block
    attention: Block | None  # takes (x, context)

    @nn.compact
    def __call__(
        self, x: jax.Array, emb: jax.Array | None = None, context: jax.Array | None = None
    ) -> jax.Array:
        x = self.resnet(self.features, name="resnets_0")(x, emb)
        if self.attention is not None:
            x = self.attention(name="attentions_0")(x, context)
        return self.resnet(self.features, name="resnets_1")(x, emb)


class UpBlock2D(nn.Module):
    """A level of a decoder, a mirrored DownBlock2D; the U-Net's also gets the encoder's skips."""

    features: int
    layers: int
    resnet: Block
    attention: Block | None  # takes (x, context)
    upsample: Block | None  # None: the last level

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        emb: jax.Array | None = None,
        context: jax.Array | None = None,
        *,
        skips: Sequence[jax.Array] | None = None,
        size: Size | None = None,
    ) -> jax.Array:
        """skips: one for each layer, in the encoder's order. size: what x is enlarged to."""
        for index in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[self.layers - 1 - index]], axis=-1)
            x = self.resnet(self.features, name=f"resnets_{index}")(x, emb)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{index}")(x, context)
        if self.upsample is not None:
            x = self.upsample(self.features, name="upsamplers_0")(x, size)
        return x


def project_and_attend(
    x: jax.Array,
    context: jax.Array,
    *,
    num_heads: int,
    use_bias: bool,
    dtype: jnp.dtype,
    result: jnp.dtype,
) -> jax.Array:
    """Multi-head attention of x [B, L, C] to context [B, S, D], to be called in a compact method.

    It returns an array of dtype `result` (see `product_in`).

    The layers are to_q, to_k, to_v (with biases or not) and to_out_0 (with one) of the caller.
    """
    channels = x.shape[-1]

    def heads(name: str, source: jax.Array) -> jax.Array:
        projected = nn.Dense(channels, use_bias=use_bias, dtype=dtype, name=name)(source)
        return projected.reshape(*source.shape[:2], num_heads, channels // num_heads)

    h = attend(heads("to_q", x), heads("to_k", context), heads("to_v", context))
    return FromHeads(channels, dtype=dtype, result=result, name="to_out_0")(h)


class FromHeads(nn.Module):
    """A Dense layer of what the heads found, side by side.

    Both axes are summed over as they are: to join them would copy the array on a TPU.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    result: jnp.dtype | None = None  # of what is returned, see `product_in`; None is `dtype`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, L, H, K] -> [B, L, features]."""
        heads, channels = x.shape[2:]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (heads * channels, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = rounded_operands(x, kernel, bias, dtype=self.dtype, result=self.result)
        kernel = kernel.reshape(heads, channels, self.features)
        product = functools.partial(jnp.einsum, "blhk,hkf->blf")
        return product_in(product, x, kernel, self.result) + bias
