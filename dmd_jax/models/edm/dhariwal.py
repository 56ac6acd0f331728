"""DhariwalUNet: the ADM network as EDM has it (arXiv 2105.05233, 2206.00364).

Parameters are named after the released state dicts: `enc.64x64_block0.conv0.weight` there is
`params["enc_64x64_block0"]["conv0"]["kernel"]` here.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import Levels, check_input, check_unet
from dmd_jax.models.ops.layers import (
    GroupNorm,
    KernelInits,
    UNetBlock,
    augment_embedding,
    conv,
    dense,
    positional_embedding,
)
from dmd_jax.models.ops.remat import rematerialised

_CHANNELS_PER_HEAD = 64
_EPSILON = 1e-5
# Uniform on +-1/sqrt(fan_in). Biases start at zero, where EDM draws them likewise.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_INITS = KernelInits(hidden=_UNIFORM, last=nn.initializers.zeros, qkv=_UNIFORM)


class DhariwalUNet(nn.Module, Levels):
    """The raw network F(x; c_noise, labels); the fields have EDM's names and defaults.

    Raises:
      UserError: an option that is impossible.
    """

    img_resolution: int  # height = width; halved len(channel_mult) - 1 times
    in_channels: int
    out_channels: int
    label_dim: int = 0  # number of classes; 0 is unconditional
    augment_dim: int = 0  # of EDM's augmentation labels, see layers.augment_embedding
    model_channels: int = 192
    channel_mult: Sequence[int] = (1, 2, 3, 4)  # one level each
    channel_mult_emb: int = 4
    num_blocks: int = 3  # a level's residual blocks in the encoder; the decoder has one more
    attn_resolutions: Sequence[int] = (32, 16, 8)  # 64 channels a head; the middle always attends
    dropout: float = 0.10
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision
    remat: str = "none"  # what the backward pass computes again, see models.ops.remat

    def __post_init__(self):
        super().__post_init__()
        check_unet(self)
        for level, mult in enumerate(self.channel_mult):
            features = self.model_channels * mult
            middle = level == len(self.channel_mult) - 1
            if (middle or self.attends(level)) and features % _CHANNELS_PER_HEAD:
                size = self.resolution(level)
                raise UserError(
                    f"DhariwalUNet attends at {size}x{size} with {features} channels; "
                    f"expected a multiple of {_CHANNELS_PER_HEAD}"
                )

    @nn.compact
    @at_own_precision
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        labels_onehot: jax.Array | None = None,
        *,
        deterministic: bool = True,
        bottleneck: bool = False,
    ) -> jax.Array:
        """The network's raw output, before preconditioning.

        Args:
          x: [B, R, R, in_channels]. c_noise: [B], float32.
          labels_onehot: [B, label_dim], float32; needed where label_dim > 0.
          deterministic: False turns dropout on and needs a "dropout" rng.
          bottleneck: ends with the encoder.

        Returns:
          [B, R, R, out_channels] in the compute dtype; the encoder's end [B, r, r, C] if
          `bottleneck`.

        Raises:
          UserError: x of another shape than the network's.
        """
        check_input(self, x)
        emb = self._embed(c_noise, labels_onehot)

        # The third argument of a block's call is `deterministic`.
        unet_block = rematerialised(UNetBlock, self.remat, static_argnums=(3,))

        def block(x, name, features, **options):
            module = unet_block(
                features,
                num_heads=features // _CHANNELS_PER_HEAD,
                dropout=self.dropout,
                scale_shift=True,
                sum_scale=1.0,
                project_resampled=False,
                epsilon=_EPSILON,
                inits=_INITS,
                dtype=self.dtype,
                name=name,
                **options,
            )
            return module(x, emb, deterministic)

        x, skips = self._encode(x.astype(self.dtype), block)
        if bottleneck:
            return x
        x = self._decode(x, skips, block)
        x = nn.silu(GroupNorm(_EPSILON, name="out_norm")(x))
        return conv(self.out_channels, 3, name="out_conv", dtype=self.dtype, init=_INITS.last)(x)

    def _embed(self, c_noise, labels_onehot):
        width = self.model_channels * self.channel_mult_emb
        emb = positional_embedding(c_noise, self.model_channels, freq_shift=0, cosines_first=True)
        if self.augment_dim:
            emb = emb + augment_embedding(self.model_channels, self.augment_dim)
        emb = nn.silu(dense(width, name="map_layer0", init=_UNIFORM)(emb))
        emb = dense(width, name="map_layer1", init=_UNIFORM)(emb)
        if self.label_dim:
            init = nn.initializers.normal(1.0)
            emb = emb + dense(width, name="map_label", init=init, use_bias=False)(labels_onehot)
        return nn.silu(emb)

    def _encode(self, x, block):
        skips = []
        for level, mult in enumerate(self.channel_mult):
            prefix = self.prefix("enc", level)
            if level == 0:
                features = self.model_channels * mult
                x = conv(features, 3, name=f"{prefix}_conv", dtype=self.dtype, init=_UNIFORM)(x)
            else:
                x = block(x, f"{prefix}_down", x.shape[-1], down=True)
            skips.append(x)
            for index in range(self.num_blocks):
                features = self.model_channels * mult
                x = block(x, f"{prefix}_block{index}", features, attention=self.attends(level))
                skips.append(x)
        return x, skips

    def _decode(self, x, skips, block):
        for level in reversed(range(len(self.channel_mult))):
            prefix = self.prefix("dec", level)
            if level == len(self.channel_mult) - 1:
                x = block(x, f"{prefix}_in0", x.shape[-1], attention=True)
                x = block(x, f"{prefix}_in1", x.shape[-1])
            else:
                x = block(x, f"{prefix}_up", x.shape[-1], up=True)
            features = self.model_channels * self.channel_mult[level]
            for index in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, f"{prefix}_block{index}", features, attention=self.attends(level))
        return x
