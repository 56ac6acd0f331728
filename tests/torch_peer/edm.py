"""EDM's two U-Nets in PyTorch, after models.edm.songunet and models.edm.dhariwal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmd_jax.errors import UserError

from .layers import GroupNorm, UNetBlock, positional_embedding

# What DDPM++ is among the variants of SongUNet; NCSN++ has no peer here.
_DDPMPP = {
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
}
_CHANNELS_PER_HEAD, _EPSILON = 64, 1e-5  # of DhariwalUNet


class _UNet(nn.Module):
    """Encoder, skips and decoder; the parameters are named as in the Flax networks.

    Args:
      network: complete (see models.complete).
      make_block: (inputs, features, **options) -> a UNetBlock.
      attends_last: the decoder attends after a level's last block alone.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        make_block: Callable[..., UNetBlock],
        *,
        attends_last: bool,
    ):
        super().__init__()
        self._names: dict[str, list[str]] = {"enc": [], "dec": []}
        mults, blocks = network["channel_mult"], network["num_blocks"]
        width = network["model_channels"]
        channels, skips = network["in_channels"], []

        def add(half: str, level: int, name: str, module: nn.Module) -> None:
            size = network["img_resolution"] >> level
            self._names[half].append(f"{half}_{size}x{size}_{name}")
            self.add_module(self._names[half][-1], module)

        def attends(level: int) -> bool:
            return network["img_resolution"] >> level in network["attn_resolutions"]

        for level, mult in enumerate(mults):
            if level == 0:
                first = width * (1 if network["name"] == "songunet" else mult)
                add("enc", level, "conv", nn.Conv2d(channels, first, 3, padding=1))
                channels = first
            else:
                add("enc", level, "down", make_block(channels, channels, down=True))
            skips.append(channels)
            for index in range(blocks):
                block = make_block(channels, width * mult, attention=attends(level))
                add("enc", level, f"block{index}", block)
                channels = width * mult
                skips.append(channels)
        for level in reversed(range(len(mults))):
            if level == len(mults) - 1:
                add("dec", level, "in0", make_block(channels, channels, attention=True))
                add("dec", level, "in1", make_block(channels, channels))
            else:
                add("dec", level, "up", make_block(channels, channels, up=True))
            for index in range(blocks + 1):
                attention = attends(level) and (index == blocks or not attends_last)
                inputs, features = channels + skips.pop(), width * mults[level]
                block = make_block(inputs, features, attention=attention)
                add("dec", level, f"block{index}", block)
                channels = features
        self.channels = channels
        self._checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """The backward pass computes the blocks again, as diffusers' networks have it."""
        self._checkpointing = True

    def augmentation(self, emb: Tensor) -> Tensor | float:
        """What augmentation labels add to the embedding: nothing, for they are zero."""
        if self.map_augment is None:
            return 0.0
        return self.map_augment(emb.new_zeros(1, self.map_augment.in_features))

    def blocks(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> what the output layers are given."""
        skips = []
        for name in self._names["enc"]:
            module = getattr(self, name)
            x = self._block(module, x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for name in self._names["dec"]:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._block(getattr(self, name), x, emb)
        return x

    def _block(self, block: UNetBlock, x: Tensor, emb: Tensor) -> Tensor:
        if self._checkpointing and self.training:
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)


class SongUNet(_UNet):
    """DDPM++, called as (x, c_noise, one-hot labels).

    Raises:
      UserError: another variant.
    """

    def __init__(self, network: Mapping[str, Any]):
        for key, expected in _DDPMPP.items():
            if network[key] != expected:
                raise UserError(
                    f"network songunet option {key} is {network[key]!r}; expected {expected!r}, "
                    "for the peer in PyTorch is DDPM++ alone"
                )
        width, emb_width = network["model_channels"], _emb_width(network)

        def make_block(inputs: int, features: int, **options) -> UNetBlock:
            return UNetBlock(
                inputs, features, emb_width, resample_filter=network["resample_filter"], **options
            )

        super().__init__(network, make_block, attends_last=True)
        self.width, self.label_scale = width, math.sqrt(network["label_dim"])
        _add_embedding(self, network, inputs=width, labels=width, label_bias=True)
        size = network["img_resolution"]
        self.out = (f"dec_{size}x{size}_aux_norm", f"dec_{size}x{size}_aux_conv")
        self.add_module(self.out[0], GroupNorm(self.channels, 1e-6))
        out = nn.Conv2d(self.channels, network["out_channels"], 3, padding=1)
        self.add_module(self.out[1], out)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = positional_embedding(c_noise, self.width)
        if self.map_label is not None:
            emb = emb + self.map_label(labels * self.label_scale)
        emb = emb + self.augmentation(emb)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        norm, conv = (getattr(self, name) for name in self.out)
        return conv(F.silu(norm(self.blocks(x, emb))))


class DhariwalUNet(_UNet):
    """ADM, called as (x, c_noise, one-hot labels)."""

    def __init__(self, network: Mapping[str, Any]):
        emb_width = _emb_width(network)

        def make_block(inputs: int, features: int, **options) -> UNetBlock:
            return UNetBlock(
                inputs,
                features,
                emb_width,
                num_heads=features // _CHANNELS_PER_HEAD,
                scale_shift=True,
                sum_scale=1.0,
                project_resampled=False,
                epsilon=_EPSILON,
                **options,
            )

        super().__init__(network, make_block, attends_last=False)
        self.width = network["model_channels"]
        _add_embedding(self, network, inputs=self.width, labels=emb_width, label_bias=False)
        self.out_norm = GroupNorm(self.channels, _EPSILON)
        self.out_conv = nn.Conv2d(self.channels, network["out_channels"], 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = positional_embedding(c_noise, self.width, freq_shift=0, cosines_first=True)
        emb = emb + self.augmentation(emb)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        return self.out_conv(F.silu(self.out_norm(self.blocks(x, F.silu(emb)))))


def _emb_width(network: Mapping[str, Any]) -> int:
    return network["model_channels"] * network["channel_mult_emb"]


def _add_embedding(
    module: nn.Module, network: Mapping[str, Any], *, inputs: int, labels: int, label_bias: bool
) -> None:
    """The layers of the noise level, the labels and the augmentation."""
    emb_width = _emb_width(network)
    module.map_layer0 = nn.Linear(inputs, emb_width)
    module.map_layer1 = nn.Linear(emb_width, emb_width)
    module.map_label = None
    if network["label_dim"]:
        module.map_label = nn.Linear(network["label_dim"], labels, bias=label_bias)
    module.map_augment = None
    if network["augment_dim"]:
        module.map_augment = nn.Linear(network["augment_dim"], inputs, bias=False)
