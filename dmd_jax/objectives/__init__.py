"""Objectives, one file each: what a step trains, on what, and by which losses."""

from dmd_jax.objectives.denoising import Denoising, denoising, fake_score_loss
from dmd_jax.objectives.dmd import DMD, dmd
from dmd_jax.objectives.draws import Draws, draw, draw_lognormal
from dmd_jax.objectives.matching import (
    Networks,
    generator_loss,
    matching_loss,
    one_architecture,
)
from dmd_jax.objectives.objective import Need, Objective, Player, Seen, View

__all__ = [
    "DMD",
    "Denoising",
    "Draws",
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
    "matching_loss",
    "one_architecture",
]
