"""What a family of teachers is to objectives, samplers and commands: functions and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.method.types import Denoise

# What rows of data say of their images, by name: [B, ...] each.
Tokens = Mapping[str, jax.Array]
# All that a step or a sampler only reads, by name: "network" is the teacher's own parameters, the
# other names are what the functions of its family take.
Frozen = Mapping[str, Any]
# (frozen, z [B, *sample_shape] standard normal, cond, key) -> x0 of that shape
Sample = Callable[[Frozen, jax.Array, Any, jax.Array], jax.Array]


class Teacher(NamedTuple):
    """A family's functions; every parameter is an argument.

    One road serves labels and text: rows of data hold tokens, `encode` makes the condition of them.
    """

    denoise: Denoise  # (params of the network, x_t [B, *sample_shape], level, cond) -> x0, float32
    schedule: NoiseSchedule  # the levels that the network was trained with
    sample_shape: tuple[int, ...]  # of one x0: (H, W, C), or (D,)
    tokens: Mapping[str, jax.ShapeDtypeStruct]  # of one row; {} for networks without a condition
    encode: Callable[[Frozen, Tokens], Any]  # -> cond, of rows [B, ...]
    null: Callable[[Frozen], Any]  # -> the condition [1, ...] of nothing, by which guidance works
    decode: Callable[[Frozen, jax.Array], jax.Array]  # x0 [B, ...] -> images [B, H, W, C]
    # (key, count) -> tokens of fresh rows; None where they can only come with the data, as text.
    draw_tokens: Callable[[jax.Array, int], Tokens] | None
    # (params of the network, x_t, level, cond) -> its bottleneck [B, ...], float32, for heads; None
    # where it has none.
    features: Denoise | None = None
    sigma_data: float | None = None  # of EDM's preconditioning; None where it is another
    takes: str = "labels"  # what a row says of its image: labels (or nothing), or text
    # (num_steps=, guidance=, **options) -> the sampler; UserError for what it does not take.
    samplers: Mapping[str, Callable[..., Sample]] = MappingProxyType({})
    # The numbers in rows of data are below these, by the tokens' names.
    limits: Mapping[str, int] = MappingProxyType({})
    # (tokens on the host, rows) -> arrays that `encode` takes; UserError where they are wrong,
    # since a device would compute something without an error.
    check: Callable[[Mapping[str, Any], int], Tokens] = lambda tokens, rows: tokens
