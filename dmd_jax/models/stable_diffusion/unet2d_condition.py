"""Stable Diffusion's U-Net, v1.x and v2.x (arXiv 2112.10752), as diffusers' UNet2DConditionModel.

Parameters are named as in PyTorch: `down_blocks.0.resnets.1.conv1.weight` there is
`params["down_blocks_0"]["resnets_1"]["conv1"]["kernel"]` here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import check_levels, check_remat, check_sizes
from dmd_jax.models.ops.layers import GroupNorm, conv, dense, positional_embedding
from dmd_jax.models.ops.remat import rematerialised
from dmd_jax.models.stable_diffusion.transformer2d import Transformer2D
from dmd_jax.models.stable_diffusion.unet2d_blocks import (
    Block,
    DownBlock2D,
    Downsample2D,
    MidBlock2D,
    ResnetBlock2D,
    UpBlock2D,
    Upsample2D,
)

TOKENS = 77  # of a prompt, padded
_ATTENDS = "CrossAttn{}Block2D"  # a level's type with attention, and without
_PLAIN = "{}Block2D"
_SIZES = {
    "sample_size": (1, 8192),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "freq_shift": (0, 1),
    "block_out_channels": (4, 65_536),
    "layers_per_block": (1, 64),
    "norm_num_groups": (1, 65_536),
    "norm_eps": (0.0, 1.0),
    "cross_attention_dim": (1, 65_536),
    "attention_head_dim": (1, 65_536),
}


class UNet2DConditionModel(nn.Module):
    """The raw network F(x_t; t, text); the fields have diffusers' names and, but for the size,
    its defaults.

    Raises:
      UserError: an option that is impossible.
    """

    sample_size: int = 64  # height = width of the latents it was made for; it takes others
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True  # the embedding of t begins with the cosines
    freq_shift: int = 0
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)  # one level each
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    norm_num_groups: int = 32
    norm_eps: float = 1e-5  # of the residual blocks
    cross_attention_dim: int = 1280  # of the text's embedding
    attention_head_dim: int | Sequence[int] = 8  # the NUMBER of heads, for all levels or for each
    use_linear_projection: bool = False
    upcast_attention: bool = False  # logits are float32 here in any case; kept for the export
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision
    remat: str = "none"  # what the backward pass computes again, see models.ops.remat

    def __post_init__(self):
        super().__post_init__()
        _check(self)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.sample_size, self.sample_size, self.in_channels)

    def example_inputs(self) -> tuple[jax.Array, ...]:
        """Zeros for `init`: x_t, time, context."""
        context = jnp.zeros((1, TOKENS, self.cross_attention_dim))
        return jnp.zeros((1, *self.sample_shape)), jnp.zeros(1), context

    @nn.compact
    @at_own_precision
    def __call__(
        self,
        x_t: jax.Array,
        time: jax.Array,
        context: jax.Array,
        *,
        deterministic: bool = True,
        bottleneck: bool = False,
    ) -> jax.Array:
        """The network's raw output: the noise, v or the clean latents.

        Args:
          x_t: [B, h, w, in_channels], of any height and width.
          time: [B], 0 to 999.
          context: [B, L, cross_attention_dim], the text's embedding.
          deterministic: without effect, there is no dropout; it makes the networks callable alike.
          bottleneck: ends with the middle block.

        Returns:
          float32 [B, h, w, out_channels]; the middle block's output [B, h', w', C] if `bottleneck`.

        Raises:
          UserError: x_t or context of another shape.
        """
        del deterministic
        _check_inputs(self, x_t, context)
        first, levels = self.block_out_channels[0], len(self.block_out_channels)
        emb = positional_embedding(
            time, first, freq_shift=self.freq_shift, cosines_first=self.flip_sin_to_cos
        )
        emb = TimestepEmbedding(4 * first, name="time_embedding")(emb)
        context = context.astype(self.dtype)

        resnet = functools.partial(
            rematerialised(ResnetBlock2D, self.remat),
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            dtype=self.dtype,
        )
        downsample = functools.partial(Downsample2D, padding_before=1, dtype=self.dtype)
        upsample = functools.partial(Upsample2D, dtype=self.dtype)

        # Where alpha is low, x0 = (x_t - sigma noise) / alpha multiplies the rounding of the noise
        # by 15. So all that is not a product is float32, as are the first and the last layer.
        x = conv(first, 3, name="conv_in", dtype=jnp.float32)(x_t)
        skips = [x]
        for level, features in enumerate(self.block_out_channels):
            block = DownBlock2D(
                features,
                self.layers_per_block,
                resnet,
                self._attention(self.down_block_types[level], level),
                downsample if level < levels - 1 else None,
                name=f"down_blocks_{level}",
            )
            x, outputs = block(x, emb, context)
            skips += outputs

        middle = self._transformer(levels - 1)
        x = MidBlock2D(features, resnet, middle, name="mid_block")(x, emb, context)
        if bottleneck:
            return x

        layers = self.layers_per_block + 1
        for index, level in enumerate(reversed(range(levels))):
            block = UpBlock2D(
                self.block_out_channels[level],
                layers,
                resnet,
                self._attention(self.up_block_types[index], level),
                upsample if level else None,
                name=f"up_blocks_{index}",
            )
            skips, own = skips[:-layers], skips[-layers:]
            # An odd size was rounded up on the way down: the enlarged image has its skip's size.
            size = skips[-1].shape[1:3] if level else None
            x = block(x, emb, context, skips=own, size=size)

        norm = GroupNorm(self.norm_eps, self.norm_num_groups, name="conv_norm_out")
        return conv(self.out_channels, 3, name="conv_out", dtype=jnp.float32)(nn.silu(norm(x)))

    def _attention(self, block_type: str, level: int) -> Block | None:
        return self._transformer(level) if block_type.startswith("CrossAttn") else None

    def _transformer(self, level: int) -> Block:
        return functools.partial(
            rematerialised(Transformer2D, self.remat),
            num_heads=_heads(self)[level],
            groups=self.norm_num_groups,
            use_linear_projection=self.use_linear_projection,
            dtype=self.dtype,
        )


class TimestepEmbedding(nn.Module):
    """Two linear layers around a SiLU, in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, C] -> [B, features]."""
        x = nn.silu(dense(self.features, name="linear_1")(x))
        return dense(self.features, name="linear_2")(x)


def _heads(network: UNet2DConditionModel) -> tuple[int, ...]:
    heads = network.attention_head_dim
    return (heads,) * len(network.block_out_channels) if isinstance(heads, int) else tuple(heads)


def _check(network: UNet2DConditionModel) -> None:
    """Raises a UserError that names the first option that is impossible."""
    name = type(network).__name__
    check_sizes(network, _SIZES)
    levels = check_levels(network, "block_out_channels")
    for field, half in (("down_block_types", "Down"), ("up_block_types", "Up")):
        types = getattr(network, field)
        known = (_ATTENDS.format(half), _PLAIN.format(half))
        if len(types) != levels or not set(types) <= set(known):
            raise UserError(
                f"{name} {field} is {str(list(types))[:200]}; expected {levels} of "
                f"{' and '.join(known)}, since block_out_channels has {levels} levels"
            )
    if len(_heads(network)) != levels:
        raise UserError(
            f"{name} attention_head_dim is {str(list(_heads(network)))[:100]}; expected one "
            f"number, or {levels}, since block_out_channels has {levels} levels"
        )
    for features, heads in zip(network.block_out_channels, _heads(network)):
        multiple = math.lcm(network.norm_num_groups, heads)
        if features % multiple:
            raise UserError(
                f"{name} block_out_channels has {features}; expected a multiple of {multiple}: "
                f"norm_num_groups is {network.norm_num_groups}, and attention_head_dim gives "
                f"{heads} heads"
            )
    if network.block_out_channels[0] % 2:
        raise UserError(
            f"{name} block_out_channels begins with {network.block_out_channels[0]}; expected an "
            "even number, since half of the embedding of t is sines and half cosines"
        )
    check_remat(network)


def _check_inputs(network: UNet2DConditionModel, x_t: jax.Array, context: jax.Array) -> None:
    name = type(network).__name__
    if x_t.ndim != 4 or x_t.shape[-1] != network.in_channels:
        raise UserError(
            f"{name} input has shape {x_t.shape}; expected [B, h, w, {network.in_channels}]"
        )
    expected = (x_t.shape[0], network.cross_attention_dim)
    if context.ndim != 3 or (context.shape[0], context.shape[2]) != expected:
        raise UserError(
            f"{name} context has shape {context.shape}; expected [{expected[0]}, L, {expected[1]}]"
        )
