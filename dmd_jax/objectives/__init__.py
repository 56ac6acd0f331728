"""Objectives, one file each: what a step trains, on what, and by which losses."""

from collections.abc import Callable
from typing import NamedTuple

from dmd_jax.objectives.denoising import Denoising, denoising, fake_score_loss
from dmd_jax.objectives.dmd import DMD, dmd
from dmd_jax.objectives.draws import Draws, draw, draw_lognormal
from dmd_jax.objectives.matching import Networks, generator_loss, one_architecture
from dmd_jax.objectives.objective import Need, Objective, Player, Seen, View


class Kind(NamedTuple):
    """An objective that config.objective.name may name."""

    settings: type  # the dataclass of the other options of config.objective
    build: Callable[..., Objective]
    players: tuple[str, ...]  # those that it may have


KINDS = {"dmd": Kind(DMD, dmd, ("generator", "fake_score"))}

__all__ = [
    "DMD",
    "KINDS",
    "Denoising",
    "Draws",
    "Kind",
    "Need",
    "Networks",
    "Objective",
    "Player",
    "Seen",
    "View",
    "denoising",
    "dmd",
    "draw",
    "draw_lognormal",
    "fake_score_loss",
    "generator_loss",
    "one_architecture",
]
