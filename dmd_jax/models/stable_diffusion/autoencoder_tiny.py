"""AutoencoderTiny (TAESD): a small stand-in for Stable Diffusion's autoencoder.

Parameters are named after diffusers' state dict: `encoder.layers.3.conv.2.weight` there is
`params["encoder"]["layers_3"]["conv_2"]["kernel"]` here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import check_sizes
from dmd_jax.models.ops import folding
from dmd_jax.models.ops.doubling import DoublingConv
from dmd_jax.models.ops.folding import FoldableConv

_CHANNELS, _BLOCKS = (1, 16_384), (0, 64)
_SIZES = {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "latent_channels": _CHANNELS,
    "encoder_block_out_channels": _CHANNELS,
    "decoder_block_out_channels": _CHANNELS,
    "num_encoder_blocks": _BLOCKS,
    "num_decoder_blocks": _BLOCKS,
    "scaling_factor": (0, 1e6),
    "shift_factor": (-1e6, 1e6),
}
_MOST_STAGES = 16
_LARGEST_LATENT = 3.0  # of the decoder's input, approached smoothly


class AutoencoderTiny(nn.Module):
    """The autoencoder; the fields have the names and defaults of diffusers' config.json.

    Of diffusers' other options this is act_fn "relu", upsample_fn "nearest" and
    upsampling_scaling_factor 2. Its latent_magnitude and latent_shift say how to store latents as
    bytes; nothing here depends on them.

    Raises:
      UserError: an option that is impossible.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    # One entry for each stage; the image is halved, or doubled, between two stages.
    encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64)
    decoder_block_out_channels: Sequence[int] = (64, 64, 64, 64)
    num_encoder_blocks: Sequence[int] = (1, 3, 3, 3)
    num_decoder_blocks: Sequence[int] = (3, 3, 3, 1)
    # A diffusion model's latents are (latents - shift_factor) * scaling_factor: the caller's to do.
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    def __post_init__(self):
        super().__post_init__()
        _check(self)

    def setup(self):
        self.encoder = _Encoder(
            self.encoder_block_out_channels[0],
            tuple(self.num_encoder_blocks),
            self.latent_channels,
            self.dtype,
        )
        self.decoder = _Decoder(
            self.decoder_block_out_channels[0],
            tuple(self.num_decoder_blocks),
            self.out_channels,
            self.dtype,
        )

    def example_inputs(self) -> tuple[jax.Array]:
        """Zeros of the shape that `init` needs: the smallest image."""
        side = 2 ** (len(self.num_encoder_blocks) - 1)
        return (jnp.zeros((1, side, side, self.in_channels)),)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The decoded latents of an image; `init` needs it."""
        return self.decode(self.encode(image))

    @at_own_precision
    def encode(self, image: jax.Array) -> jax.Array:
        """The latents of images.

        Args:
          image: [B, H, W, in_channels] in [-1, 1], H and W multiples of 8 (with four stages).

        Returns:
          float32 [B, H/8, W/8, latent_channels]: the latents themselves, where AutoencoderKL has a
          distribution of them.

        Raises:
          UserError: images of another shape.
        """
        side = 2 ** (len(self.num_encoder_blocks) - 1)
        _check_input(image, self.in_channels, "image")
        if image.shape[1] % side or image.shape[2] % side:
            raise UserError(
                f"AutoencoderTiny image has shape {image.shape}; expected a height and a width "
                f"divisible by {side}"
            )
        return self.encoder((image.astype(jnp.float32) + 1) / 2)

    @at_own_precision
    def decode(self, z: jax.Array) -> jax.Array:
        """The images of latents.

        Args:
          z: [B, h, w, latent_channels].

        Returns:
          float32 [B, 8h, 8w, out_channels] (with four stages), about in [-1, 1]: not clipped.

        Raises:
          UserError: latents of another shape.
        """
        _check_input(z, self.latent_channels, "latent")
        z = _LARGEST_LATENT * jnp.tanh(z.astype(jnp.float32) / _LARGEST_LATENT)
        return 2 * self.decoder(z) - 1


class _Encoder(nn.Module):
    channels: int
    blocks: tuple[int, ...]  # of each stage
    out_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C], 0 to 1 -> float32 [B, H/8, W/8, out_channels]."""
        layer = 0
        for stage, count in enumerate(self.blocks):
            halve = {"stride": 2, "use_bias": False} if stage else {}
            x = _conv(self.channels, f"layers_{layer}", self.dtype, **halve)(x)
            x = _blocks(x, layer + 1, count, self.channels, dtype=self.dtype)
            layer += 1 + count
        x = _conv(self.out_channels, f"layers_{layer}", self.dtype)(x)
        return x.astype(jnp.float32)


class _Decoder(nn.Module):
    channels: int
    blocks: tuple[int, ...]  # of each stage
    out_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """[B, h, w, C] -> float32 [B, 8h, 8w, out_channels], about 0 to 1."""
        folded = folding.pays(z.shape[2], self.channels)
        z = folding.fold(z) if folded else z
        options = dict(folded=folded, dtype=self.dtype)
        x = nn.relu(FoldableConv(self.channels, name="layers_0", **options)(z))
        layer = 2  # the activation and the doubling count as layers in the names
        for count in self.blocks[:-1]:
            x = _blocks(x, layer, count, self.channels, **options)
            layer += count + 1
            x = DoublingConv(self.channels, use_bias=False, name=f"layers_{layer}", **options)(x)
            layer += 1
        x = _blocks(x, layer, self.blocks[-1], self.channels, **options)
        layer += self.blocks[-1]
        x = FoldableConv(self.out_channels, name=f"layers_{layer}", **options)(x)
        return (folding.unfold(x) if folded else x).astype(jnp.float32)


def _blocks(
    x: jax.Array, first: int, count: int, channels: int, *, folded: bool = False, dtype: jnp.dtype
) -> jax.Array:
    """`count` residual blocks, as the layers from number `first` on."""
    for index in range(count):
        x = _Block(channels, folded, dtype, name=f"layers_{first + index}")(x)
    return x


class _Block(nn.Module):
    channels: int
    folded: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(FoldableConv, self.channels, self.folded, self.dtype)
        h = nn.relu(conv(name="conv_0")(x))
        h = nn.relu(conv(name="conv_2")(h))
        return nn.relu(conv(name="conv_4")(h) + x)


def _conv(
    features: int, name: str, dtype: jnp.dtype, *, stride: int = 1, use_bias: bool = True
) -> nn.Conv:
    """A 3x3 convolution with one zero at each edge; "SAME" would pad one end only at stride 2."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=use_bias,
        dtype=dtype,
        name=name,
    )


def _check(network: AutoencoderTiny) -> None:
    check_sizes(network, _SIZES)
    name = type(network).__name__
    for half in ("encoder", "decoder"):
        field, blocks = f"{half}_block_out_channels", f"num_{half}_blocks"
        channels, stages = getattr(network, field), len(getattr(network, blocks))
        if stages > _MOST_STAGES:
            raise UserError(f"{name} {blocks} has {stages} entries; expected 1 to {_MOST_STAGES}")
        if len(channels) != stages or len(set(channels)) != 1:
            raise UserError(
                f"{name} {field} is {str(tuple(channels))[:100]}; expected one number for each of "
                f"the {stages} entries of {blocks}, all equal"
            )
    if not network.scaling_factor:
        raise UserError(f"{name} scaling_factor is 0; expected a factor that can be divided by")


def _check_input(x: jax.Array, channels: int, what: str) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise UserError(
            f"AutoencoderTiny {what} has shape {x.shape}; expected [B, height, width, {channels}]"
        )
