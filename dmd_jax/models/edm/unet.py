"""What networks have in common beyond their layers.

Of all of them, that impossible sizes are refused; of EDM's two U-Nets, also levels and options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.models.ops.remat import REMATS

# Checkpoints say their own sizes, and a loop over a billion blocks would never end.
_SIZES = {
    "img_resolution": (1, 8192),
    "in_channels": (1, 1024),
    "out_channels": (1, 1024),
    "label_dim": (0, 1_000_000),
    "augment_dim": (0, 1_000_000),
    "model_channels": (4, 16_384),
    "channel_mult": (1, 64),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),  # which only SongUNet has
    "num_blocks": (0, 64),
}
_MOST_LEVELS = _MOST_TAPS = 16
_LARGEST_TAP = 1e6


class RawNetwork:
    """What networks F(x; c_noise, labels) under EDM's preconditioning have in common."""

    def example_inputs(self) -> tuple[jax.Array | None, ...]:
        """Zeros for `init`: x, c_noise, and labels where there are any."""
        labels = jnp.zeros((1, self.label_dim)) if self.label_dim else None
        return jnp.zeros((1, *self.sample_shape)), jnp.zeros(1), labels


class Levels(RawNetwork):
    """A U-Net's levels: level 0 has the image's resolution, each further one half of it."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.img_resolution, self.img_resolution, self.in_channels)

    def resolution(self, level: int) -> int:
        return self.img_resolution >> level

    def attends(self, level: int) -> bool:
        """Whether the level's resolution is among those with attention."""
        return self.resolution(level) in self.attn_resolutions

    def prefix(self, half: str, level: int) -> str:
        """What the names of the level's modules begin with, in the half "enc" or "dec"."""
        size = self.resolution(level)
        return f"{half}_{size}x{size}"


def check_sizes(network: nn.Module, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises a UserError that names the first field, number or numbers, out of (least, most)."""
    for field, (least, most) in limits.items():
        value = getattr(network, field)
        sizes = value if isinstance(value, Sequence) else (value,)
        if not sizes or not all(least <= size <= most for size in sizes):
            raise UserError(
                f"{type(network).__name__} {field} is {str(value)[:100]}; "
                f"expected {least} to {most}"
            )


def check_levels(network: nn.Module, field: str) -> int:
    """The number of levels, of which `field` has one entry each.

    Raises:
      UserError: they are too many.
    """
    levels = len(getattr(network, field))
    if levels > _MOST_LEVELS:
        raise UserError(
            f"{type(network).__name__} {field} has {levels} levels; expected 1 to {_MOST_LEVELS}"
        )
    return levels


def check_remat(network: nn.Module) -> None:
    """Raises a UserError unless `remat` is one of models.ops.remat's."""
    if network.remat not in REMATS:
        raise UserError(
            f"{type(network).__name__} remat is {network.remat!r}; "
            f"expected one of {', '.join(REMATS)}"
        )


def check_unet(network: nn.Module) -> None:
    """Raises a UserError that names the first option of a U-Net of EDM's that is impossible."""
    name = type(network).__name__
    check_sizes(network, {field: _SIZES[field] for field in _SIZES if hasattr(network, field)})
    levels = check_levels(network, "channel_mult")
    if network.img_resolution % 2 ** (levels - 1):
        raise UserError(
            f"{name} img_resolution is {network.img_resolution}; expected a multiple of "
            f"{2 ** (levels - 1)}, since channel_mult has {levels} levels"
        )
    if network.model_channels % 2:
        raise UserError(
            f"{name} model_channels is {network.model_channels}; expected an even number, since "
            "half of the noise embedding is sines and half cosines"
        )
    check_remat(network)
    if not 0 <= network.dropout < 1:
        raise UserError(f"{name} dropout is {network.dropout}; expected 0 or more and below 1")


def check_taps(network: nn.Module) -> None:
    """Raises a UserError unless the resampling filter keeps an image's place and brightness."""
    taps = network.resample_filter
    even = 2 <= len(taps) <= _MOST_TAPS and not len(taps) % 2
    if not even or not all(abs(tap) <= _LARGEST_TAP for tap in taps) or not sum(taps) > 0:
        raise UserError(
            f"{type(network).__name__} resample_filter is {str(list(taps))[:100]}; expected taps "
            f"up to {_LARGEST_TAP:g} whose sum is positive, an even number up to {_MOST_TAPS}"
        )


def check_input(network: nn.Module, x: jax.Array) -> None:
    """Raises a UserError unless x is [B, *network.sample_shape]."""
    if x.shape[1:] != network.sample_shape:
        name = type(network).__name__
        raise UserError(
            f"{name} input has shape {x.shape}; expected [B, "
            f"{', '.join(map(str, network.sample_shape))}]"
        )
