"""SongUNet: the DDPM++ and NCSN++ networks as EDM has them (arXiv 2011.13456, 2206.00364).

Parameters are named after the released state dicts: `enc.32x32_block0.conv0.weight` there is
`params["enc_32x32_block0"]["conv0"]["kernel"]` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.edm.unet import Levels, check_input, check_taps, check_unet
from dmd_jax.models.ops.layers import (
    SQRT_HALF,
    XAVIER,
    FourierEmbedding,
    GroupNorm,
    UNetBlock,
    augment_embedding,
    conv,
    dense,
    downsample,
    filter_padding,
    positional_embedding,
    upsample,
)
from dmd_jax.models.ops.remat import rematerialised

_CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module, Levels):
    """The raw network F(x; c_noise, labels); the fields have EDM's names and defaults.

    DDPM++: the defaults. NCSN++: embedding_type="fourier", channel_mult_noise=2,
    encoder_type="residual", resample_filter=(1, 3, 3, 1).

    Raises:
      UserError: a field that names no variant, or an option that is impossible.
    """

    img_resolution: int  # height = width; halved len(channel_mult) - 1 times
    in_channels: int
    out_channels: int
    label_dim: int = 0  # number of classes; 0 is unconditional
    augment_dim: int = 0  # of EDM's augmentation labels, see layers.augment_embedding
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)  # one level each
    channel_mult_emb: int = 4
    num_blocks: int = 4  # a level's residual blocks in the encoder; the decoder has one more
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.10
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[float] = (1, 1)
    dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision
    remat: str = "none"  # what the backward pass computes again, see models.ops.remat

    def __post_init__(self):
        super().__post_init__()
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(
                    f"songunet {field} is {getattr(self, field)!r}; "
                    f"expected one of {', '.join(choices)}"
                )
        check_unet(self)
        check_taps(self)

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
                dropout=self.dropout,
                resample_filter=self.resample_filter,
                dtype=self.dtype,
                name=name,
                **options,
            )
            return module(x, emb, deterministic)

        x, skips = self._encode(x.astype(self.dtype), block)
        if bottleneck:
            return x
        return self._decode(x, skips, block)

    def _embed(self, c_noise, labels_onehot):
        features = self.model_channels * self.channel_mult_noise
        if self.embedding_type == "fourier":
            emb = FourierEmbedding(features, name="map_noise")(c_noise)
        else:
            emb = positional_embedding(c_noise, features)
        if self.label_dim:
            # One-hot labels have variance about 1/label_dim; this brings them to one.
            scaled = labels_onehot * math.sqrt(self.label_dim)
            emb = emb + dense(features, name="map_label")(scaled)
        if self.augment_dim:
            emb = emb + augment_embedding(features, self.augment_dim)
        emb = nn.silu(dense(self.model_channels * self.channel_mult_emb, name="map_layer0")(emb))
        return nn.silu(dense(self.model_channels * self.channel_mult_emb, name="map_layer1")(emb))

    def _encode(self, x, block):
        aux = x  # the input pyramid ("skip") or the residual chain ("residual")
        skips = []
        for level, mult in enumerate(self.channel_mult):
            prefix = self.prefix("enc", level)
            if level == 0:
                x = conv(self.model_channels, 3, name=f"{prefix}_conv", dtype=self.dtype)(x)
            else:
                channels = x.shape[-1]
                x = block(x, f"{prefix}_down", channels, down=True)
                if self.encoder_type == "skip":
                    aux = downsample(aux, self.resample_filter)
                    name = f"{prefix}_aux_skip"
                    x = x + conv(channels, 1, name=name, dtype=self.dtype)(aux)
                elif self.encoder_type == "residual":
                    aux = self._fused_down(aux, channels, f"{prefix}_aux_residual")
                    x = aux = (x + aux) * SQRT_HALF
            skips.append(x)
            for index in range(self.num_blocks):
                attention = self.attends(level)
                features = self.model_channels * mult
                x = block(x, f"{prefix}_block{index}", features, attention=attention)
                skips.append(x)
        return x, skips

    def _fused_down(self, x, features, name):
        # Both paddings are the convolution's, so the filter blurs an image with a known margin.
        margin = filter_padding(self.resample_filter)
        x = conv(features, 3, name=name, dtype=self.dtype, padding=1 + margin)(x)
        return downsample(x, self.resample_filter, padding=0)

    def _decode(self, x, skips, block):
        out = None
        for level in reversed(range(len(self.channel_mult))):
            prefix = self.prefix("dec", level)
            if level == len(self.channel_mult) - 1:
                x = block(x, f"{prefix}_in0", x.shape[-1], attention=True)
                x = block(x, f"{prefix}_in1", x.shape[-1])
            else:
                x = block(x, f"{prefix}_up", x.shape[-1], up=True)
            features = self.model_channels * self.channel_mult[level]
            for index in range(self.num_blocks + 1):
                # The decoder attends once a level, after its last block.
                attention = index == self.num_blocks and self.attends(level)
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, f"{prefix}_block{index}", features, attention=attention)
            if self.decoder_type == "skip" or level == 0:
                h = nn.silu(GroupNorm(name=f"{prefix}_aux_norm")(x))
                name = f"{prefix}_aux_conv"
                h = conv(self.out_channels, 3, name=name, dtype=self.dtype, init=XAVIER.last)(h)
                out = h if out is None else upsample(out, self.resample_filter) + h
        return out
