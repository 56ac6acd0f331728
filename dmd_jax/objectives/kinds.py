"""The objectives that a config may name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dmd_jax.objectives.consistency import Consistency, consistency
from dmd_jax.objectives.dmd import DMD, dmd
from dmd_jax.objectives.dmd2 import DMD2, dmd2
from dmd_jax.objectives.f_distill import FDistill, f_distill
from dmd_jax.objectives.objective import Objective
from dmd_jax.objectives.progressive import Progressive, progressive
from dmd_jax.objectives.reflow import Reflow, reflow
from dmd_jax.objectives.sid import SiD, sid


class Kind(NamedTuple):
    """An objective that config.objective.name may name."""

    settings: type  # the dataclass of the other options of config.objective
    build: Callable[..., Objective]
    players: tuple[str, ...]  # those that it may have


_ONE, _TWO = ("generator",), ("generator", "fake_score")
KINDS = {
    "dmd": Kind(DMD, dmd, _TWO),
    "dmd2": Kind(DMD2, dmd2, _TWO),
    "f_distill": Kind(FDistill, f_distill, _TWO),
    "sid": Kind(SiD, sid, _TWO),
    "consistency": Kind(Consistency, consistency, _ONE),
    "progressive": Kind(Progressive, progressive, _ONE),
    "reflow": Kind(Reflow, reflow, _ONE),
}
