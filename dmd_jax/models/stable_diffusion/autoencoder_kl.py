"""Stable Diffusion's autoencoder (arXiv 2112.10752), as diffusers' AutoencoderKL.

Parameters are named as in PyTorch: `encoder.down_blocks.0.resnets.1.conv1.weight` there is
`params["encoder"]["down_blocks_0"]["resnets_1"]["conv1"]["kernel"]` here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import check_levels, check_sizes
from dmd_jax.models.ops.layers import GroupNorm, conv
from dmd_jax.models.stable_diffusion.unet2d_blocks import (
    DownBlock2D,
    Downsample2D,
    MidBlock2D,
    ResnetBlock2D,
    UpBlock2D,
    Upsample2D,
    project_and_attend,
)

_EPSILON = 1e-6  # of every norm
_LOG_VARIANCE = (-30.0, 20.0)
_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_SIZES = {
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "block_out_channels": (1, 65_536),
    "layers_per_block": (1, 64),
    "latent_channels": (1, 1024),
    "norm_num_groups": (1, 65_536),
    "scaling_factor": (1e-6, 1e6),
}


class AutoencoderKL(nn.Module):
    """Images to latents and back; the fields have diffusers' names and defaults.

    Neither method scales: the latents of a diffusion model are (z - shift_factor) scaling_factor.

    Raises:
      UserError: an option that is impossible.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: Sequence[str] = ("DownEncoderBlock2D",)
    up_block_types: Sequence[str] = ("UpDecoderBlock2D",)
    block_out_channels: Sequence[int] = (64,)  # one level each; each but the last halves the image
    layers_per_block: int = 1  # of the encoder; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None  # None is zero
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    def __post_init__(self):
        super().__post_init__()
        _check(self)

    def setup(self):
        options = dict(
            block_out_channels=tuple(self.block_out_channels),
            layers=self.layers_per_block,
            groups=self.norm_num_groups,
            dtype=self.dtype,
        )
        moments = 2 * self.latent_channels
        self.encoder = Encoder(moments, **options)
        self.decoder = Decoder(self.out_channels, **options)
        self.quant_conv = nn.Conv(moments, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    @property
    def factor(self) -> int:
        """How many pixels a side of a latent stands for: 8 in Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    def example_inputs(self) -> tuple[jax.Array]:
        """Zeros for `init`: the smallest image."""
        return (jnp.zeros((1, self.factor, self.factor, self.in_channels)),)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The image [B, H, W, in_channels] through both halves, by the mean of its latents."""
        return self.decode(self.encode(image)[0])

    @at_own_precision
    def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The Gaussian of an image's latents.

        Args:
          image: [B, H, W, in_channels] in [-1, 1], H and W multiples of `factor`.

        Returns:
          (mean, log_variance), float32 [B, H / factor, W / factor, latent_channels] each. The
          log-variance is clipped to -30 and 20.

        Raises:
          UserError: an image of another shape.
        """
        height, width, channels = image.shape[1:] if image.ndim == 4 else (1, 1, 0)
        if channels != self.in_channels or height % self.factor or width % self.factor:
            raise UserError(
                f"AutoencoderKL input has shape {image.shape}; expected [B, H, W, "
                f"{self.in_channels}], H and W multiples of {self.factor}"
            )
        moments = self.quant_conv(self.encoder(image.astype(self.dtype))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

    @at_own_precision
    def decode(self, z: jax.Array) -> jax.Array:
        """The image of latents z [B, h, w, latent_channels].

        Returns:
          float32 [B, h factor, w factor, out_channels], about in [-1, 1] and not clipped.

        Raises:
          UserError: z of another shape.
        """
        if z.ndim != 4 or z.shape[-1] != self.latent_channels:
            raise UserError(
                f"AutoencoderKL latents have shape {z.shape}; expected [B, h, w, "
                f"{self.latent_channels}]"
            )
        return self.decoder(self.post_quant_conv(z.astype(self.dtype))).astype(jnp.float32)


class Encoder(nn.Module):
    """Image [B, H, W, C] -> moments [B, H / 2^(levels - 1), ..., out_channels]."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        resnet, attention = _blocks(self.groups, self.dtype)
        downsample = functools.partial(Downsample2D, padding_before=0, dtype=self.dtype)
        last = len(self.block_out_channels) - 1
        x = conv(self.block_out_channels[0], 3, name="conv_in", dtype=self.dtype)(x)
        for level, features in enumerate(self.block_out_channels):
            halve = downsample if level < last else None
            name = f"down_blocks_{level}"
            x, _ = DownBlock2D(features, self.layers, resnet, None, halve, name=name)(x)
        x = MidBlock2D(features, resnet, attention, name="mid_block")(x)
        x = nn.silu(GroupNorm(_EPSILON, self.groups, name="conv_norm_out")(x))
        return conv(self.out_channels, 3, name="conv_out", dtype=self.dtype)(x)


class Decoder(nn.Module):
    """Latents [B, h, w, C] -> image [B, h 2^(levels - 1), ..., out_channels]."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers: int  # the encoder's
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        resnet, attention = _blocks(self.groups, self.dtype)
        upsample = functools.partial(Upsample2D, dtype=self.dtype)
        widths = self.block_out_channels[::-1]
        x = conv(widths[0], 3, name="conv_in", dtype=self.dtype)(x)
        x = MidBlock2D(widths[0], resnet, attention, name="mid_block")(x)
        for index, features in enumerate(widths):
            double = upsample if index < len(widths) - 1 else None
            name = f"up_blocks_{index}"
            x = UpBlock2D(features, self.layers + 1, resnet, None, double, name=name)(x)
        x = nn.silu(GroupNorm(_EPSILON, self.groups, name="conv_norm_out")(x))
        return conv(self.out_channels, 3, name="conv_out", dtype=self.dtype)(x)


class SpatialAttention(nn.Module):
    """Attention of one head over an image's pixels, behind a norm, added to the image."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: None = None) -> jax.Array:
        """x [B, H, W, C] -> [B, H, W, C]; the context is the U-Net's, here there is none."""
        h = GroupNorm(_EPSILON, self.groups, name="group_norm")(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        h = project_and_attend(h, h, num_heads=1, use_bias=True, dtype=self.dtype, result=x.dtype)
        return x + h.reshape(x.shape)


def _blocks(groups: int, dtype: jnp.dtype):
    resnet = functools.partial(ResnetBlock2D, groups=groups, epsilon=_EPSILON, dtype=dtype)
    return resnet, functools.partial(SpatialAttention, groups=groups, dtype=dtype)


def _check(network: AutoencoderKL) -> None:
    """Raises a UserError that names the first option that is impossible."""
    name = type(network).__name__
    check_sizes(network, _SIZES)
    levels = check_levels(network, "block_out_channels")
    for field, known in _TYPES.items():
        types = getattr(network, field)
        if list(types) != [known] * levels:
            raise UserError(
                f"{name} {field} is {str(list(types))[:200]}; expected {levels} of {known}, "
                f"since block_out_channels has {levels} levels"
            )
    for features in network.block_out_channels:
        if features % network.norm_num_groups:
            raise UserError(
                f"{name} block_out_channels has {features}; expected a multiple of "
                f"norm_num_groups, {network.norm_num_groups}"
            )
    if network.shift_factor is not None and not abs(network.shift_factor) <= 1e6:
        raise UserError(f"{name} shift_factor is {network.shift_factor}; expected at most 1e6")
