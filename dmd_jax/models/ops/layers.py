"""The parts that networks share: embeddings, convolutions and norms; and those of EDM's alone:
filtered resampling and the U-Net's residual block.

Facts and constants are those of EDM's networks, released with arXiv 2206.00364; Stable Diffusion's
give their own as arguments. Parameters are float32 always; `dtype` is what the convolutions
compute in, norms and softmax are float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dmd_jax.errors import UserError
from dmd_jax.models.ops.attention import attend
from dmd_jax.models.ops.products import product_in, rounded_operands
from dmd_jax.parallel.sharding import gathered, keep_rows

SQRT_HALF = math.sqrt(0.5)


def positional_embedding(
    c_noise: jax.Array, features: int, *, freq_shift: int = 1, cosines_first: bool = False
) -> jax.Array:
    """[B] -> [B, features]: sines, then cosines, of frequencies from 1 down to 1/10000.

    The frequencies are 10000^(-i / (features / 2 - freq_shift)): exactly 1/10000 is reached where
    freq_shift is 1, and only nearly where it is 0. SongUNet has the sines first,
    DhariwalUNet and Stable Diffusion the cosines.
    """
    half = features // 2
    freqs = 10000.0 ** -(np.arange(half) / (half - freq_shift))
    angles = jnp.outer(c_noise, jnp.asarray(freqs, jnp.float32))
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if cosines_first else waves, axis=-1)


class FourierEmbedding(nn.Module):
    """[B] -> [B, features]: sines, then cosines, of random frequencies that are never trained.

    The frequencies are a parameter because a network is useless without the ones that it was
    trained with. Their gradient is zero; an optimiser must not decay them either.
    """

    features: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, c_noise: jax.Array) -> jax.Array:
        freqs = self.param(
            "freqs", nn.initializers.normal(self.scale), (self.features // 2,), jnp.float32
        )
        angles = jnp.outer(c_noise, 2 * math.pi * lax.stop_gradient(freqs))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def xavier_uniform(gain: float = 1.0) -> nn.initializers.Initializer:
    """Uniform on +-gain * sqrt(6 / (fan_in + fan_out))."""
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


class KernelInits(NamedTuple):
    """How the kernels of a block start."""

    hidden: nn.initializers.Initializer
    last: nn.initializers.Initializer  # of what is added to the residual stream
    qkv: nn.initializers.Initializer


XAVIER = KernelInits(xavier_uniform(), xavier_uniform(1e-5), xavier_uniform(math.sqrt(0.2)))


def conv(
    features: int,
    size: int | tuple[int, int],
    *,
    name: str,
    dtype: jnp.dtype,
    result: jnp.dtype | None = None,
    init: nn.initializers.Initializer = XAVIER.hidden,
    strides: int = 1,
    padding: int | Sequence[tuple[int, int]] | None = None,
) -> nn.Conv:
    """A size x size convolution that computes in `dtype`.

    Args:
      size: of the kernel; a pair is its height and width, and needs a padding.
      result: the dtype of what it returns, see `product_in`; None: `dtype`.
      padding: zeros at the edges; None: as many as keep the image's size.
    """
    return nn.Conv(
        features,
        (size, size) if isinstance(size, int) else size,
        strides,
        padding=size // 2 if padding is None else padding,
        kernel_init=init,
        conv_general_dilated=functools.partial(_convolution, result=result),
        promote_dtype=functools.partial(rounded_operands, result=result),
        dtype=dtype,
        name=name,
    )


def _convolution(
    x: jax.Array,
    kernel: jax.Array,
    *args: Any,
    result: jnp.dtype | None,
    **options: Any,
) -> jax.Array:
    """lax.conv_general_dilated, for which the kernel is gathered."""

    def product(x: jax.Array, kernel: jax.Array, **wanted: Any) -> jax.Array:
        return lax.conv_general_dilated(x, gathered(kernel), *args, **options, **wanted)

    return product_in(product, x, kernel, result)


class RowsDense(nn.Dense):
    """A linear layer of [B, C] whose examples stay on their devices.

    Left to itself, XLA may gather the examples of all devices, which are small, rather than the
    weights; the traffic then grows with the devices.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return keep_rows(super().__call__(keep_rows(inputs)))


def dense(
    features: int,
    *,
    name: str,
    init: nn.initializers.Initializer = XAVIER.hidden,
    use_bias: bool = True,
) -> nn.Dense:
    """A linear layer of the embedding. It is float32 in every compute dtype, being cheap."""
    return RowsDense(features, use_bias=use_bias, kernel_init=init, dtype=jnp.float32, name=name)


def layer_norm(*, name: str, dtype: jnp.dtype, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Layer normalisation with statistics in float32; epsilon is PyTorch's default."""
    # Linen's default takes the variance as E[x^2] - E[x]^2, which cancels where the mean is large.
    return nn.LayerNorm(epsilon, use_fast_variance=False, dtype=dtype, name=name)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x Phi(x) (arXiv 1606.08415), in float32."""
    # As PyTorch writes it. JAX's own has erfc, which costs a TPU several times as much.
    x = x.astype(jnp.float32)
    return 0.5 * x * (1 + lax.erf(x * SQRT_HALF))


def augment_embedding(features: int, augment_dim: int) -> jax.Array:
    """What augmentation labels add to the embedding, [1, features]: nothing, for they are zero.

    EDM's teachers learned from augmented images and were told how; a sample is of an image that is
    not. The layer is there so that a network has all of its checkpoint's parameters.
    """
    labels = jnp.zeros((1, augment_dim), jnp.float32)
    return dense(features, name="map_augment", use_bias=False)(labels)


class GroupNorm(nn.Module):
    """Group normalisation with statistics in float32."""

    epsilon: float = 1e-6
    groups: int | None = None  # None: 32, or fewer where a group would have less than 4 channels
    dtype: jnp.dtype | None = None  # of the result; None is the input's
    one_pass: bool = False  # over float32 too: see below

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] -> the same shape."""
        channels = x.shape[-1]
        groups = min(32, channels // 4) if self.groups is None else self.groups
        if not groups or channels % groups:
            raise UserError(
                f"{self.name}: {channels} channels do not divide into {groups} groups; expected "
                "channels that do: without norm_num_groups a multiple of 4 up to 128, of 32 above "
                "(see model_channels and channel_mult)"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        # Over the pixels first, then within groups: channels stay the innermost axis, which
        # makes a training step on CPU about an eighth faster than Linen's GroupNorm.
        def group_mean(value):
            mean = value.mean(axis=(1, 2)).reshape(-1, groups, channels // groups).mean(axis=-1)
            return jnp.repeat(mean, channels // groups, axis=-1)[:, None, None, :]

        values = x.astype(jnp.float32)
        mean = group_mean(values)
        if self.one_pass or x.dtype == jnp.bfloat16:
            # Both sums are made while x is written. That the difference cancels where the mean is
            # large changes it by less than rounding x to bfloat16 does, before or after the norm:
            # 2^-24 to 2^-18 of mean^2.
            variance = jnp.maximum(group_mean(jnp.square(values)) - jnp.square(mean), 0)
        else:
            # The variance is stationary in the mean, so its gradient need not wait for the sum over
            # the pixels that the mean's would be.
            variance = group_mean(jnp.square(values - lax.stop_gradient(mean)))
        factor = scale * lax.rsqrt(variance + self.epsilon)
        return ((values - mean) * factor + bias).astype(self.dtype or x.dtype)


def filter_padding(taps: Sequence[float]) -> int:
    """The padding at which a resampling filter keeps the image centred and exactly halves it."""
    return (len(taps) - 1) // 2


def downsample(x: jax.Array, taps: Sequence[float], padding: int | None = None) -> jax.Array:
    """Filters both image axes with the normalised taps, zero-padded, and keeps every second one.

    Args:
      x: [B, H, W, C]. padding: zeros at each end; the filter's own padding where it is None,
        which gives [B, H/2, W/2, C].
    """
    padding = filter_padding(taps) if padding is None else padding
    for axis in (1, 2):
        x = lax.pad(x, jnp.zeros((), x.dtype), _edges(x.ndim, axis, padding, padding, 0))
        length = (x.shape[axis] - len(taps)) // 2 + 1
        x = sum(
            tap * lax.slice_in_dim(x, i, i + 2 * length - 1, stride=2, axis=axis)
            for i, tap in enumerate(_normalised(taps))
        )
    return x


def upsample(x: jax.Array, taps: Sequence[float]) -> jax.Array:
    """Doubles both image axes: zeros between the pixels, then the filter at twice its gain.

    Args:
      x: [B, H, W, C]; the result is [B, 2H, 2W, C].
    """
    # In the transposed sense: `padding` is cut from the full convolution's ends.
    ends = len(taps) - 1 - filter_padding(taps)
    for axis in (1, 2):
        x = lax.pad(x, jnp.zeros((), x.dtype), _edges(x.ndim, axis, ends, ends, 1))
        length = x.shape[axis] - len(taps) + 1
        x = sum(
            2 * tap * lax.slice_in_dim(x, i, i + length, axis=axis)
            for i, tap in enumerate(_normalised(taps[::-1]))
        )
    return x


def _normalised(taps: Sequence[float]) -> list[float]:
    return [float(tap) / sum(taps) for tap in taps]


def _edges(ndim: int, axis: int, low: int, high: int, interior: int) -> list[tuple[int, int, int]]:
    return [(low, high, interior) if i == axis else (0, 0, 0) for i in range(ndim)]


class UNetBlock(nn.Module):
    """Residual block: norm, SiLU, convolution twice, the embedding added between; then attention.

    The defaults are SongUNet's: every sum of two branches is scaled by sqrt(1/2), which keeps the
    variance.
    """

    features: int
    up: bool = False
    down: bool = False
    attention: bool = False
    num_heads: int = 1
    dropout: float = 0.0
    resample_filter: Sequence[float] = (1, 1)
    scale_shift: bool = False  # the embedding scales and shifts the norm rather than being added
    sum_scale: float = SQRT_HALF  # of every sum of two branches
    project_resampled: bool = True  # the skip of up and down is also a 1x1 convolution
    epsilon: float = 1e-6  # of the norms
    inits: KernelInits = XAVIER
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, H, W, C], emb [B, E] -> [B, H', W', features], H' = 2H (up), H/2 (down) or H."""
        hidden, last, _ = self.inits
        h = self._resample(nn.silu(self._norm("norm0")(x)))
        h = conv(self.features, 3, name="conv0", dtype=self.dtype, init=hidden)(h)
        h = nn.silu(self._embedded(h, emb))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = conv(self.features, 3, name="conv1", dtype=self.dtype, init=last)(h)
        resampled = self.up or self.down
        x = self._resample(x)
        if x.shape[-1] != self.features or (resampled and self.project_resampled):
            x = conv(self.features, 1, name="skip", dtype=self.dtype, init=hidden)(x)
        x = (x + h) * self.sum_scale
        if self.attention:
            x = (x + self._attention(self._norm("norm2")(x))) * self.sum_scale
        return x

    def _norm(self, name: str) -> GroupNorm:
        return GroupNorm(self.epsilon, name=name)

    def _embedded(self, h: jax.Array, emb: jax.Array) -> jax.Array:
        """The second norm, with the embedding in front of it or as its scale and shift."""
        width = self.features * (2 if self.scale_shift else 1)
        affine = dense(width, name="affine", init=self.inits.hidden)(emb).astype(self.dtype)
        affine = affine[:, None, None, :]
        if not self.scale_shift:
            return self._norm("norm1")(h + affine)
        scale, shift = jnp.split(affine, 2, axis=-1)
        return self._norm("norm1")(h) * (scale + 1) + shift

    def _resample(self, x: jax.Array) -> jax.Array:
        if self.up:
            return upsample(x, self.resample_filter)
        return downsample(x, self.resample_filter) if self.down else x

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        qkv = conv(3 * channels, 1, name="qkv", dtype=self.dtype, init=self.inits.qkv)(x)
        # The checkpoints' layout: heads outermost, q, k and v innermost.
        qkv = qkv.reshape(batch, height * width, self.num_heads, channels // self.num_heads, 3)
        h = attend(qkv[..., 0], qkv[..., 1], qkv[..., 2])
        h = h.reshape(batch, height, width, channels)
        return conv(channels, 1, name="proj", dtype=self.dtype, init=self.inits.last)(h)
