"""The pictures of a run, always of the same rows and latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmd_jax.distillation.setting import Setting
from dmd_jax.objectives import Objective
from dmd_jax.parallel.sharding import replicated
from dmd_jax.reporting.pictures import grid, signed, to_uint8, viewing_scale
from dmd_jax.teachers.teacher import Frozen
from dmd_jax.training.state import TrainState

# Rows of images from the top; an objective has some of them.
ROWS = ("x", "x_t", "denoised_real", "denoised_fake", "gradient", "x_ref", "y_ref")
COLUMNS = 10  # of images that are no such rows


def preview(
    setting: Setting, objective: Objective, frozen: Frozen, before: Frozen, mesh: Mesh
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """An objective's pictures of the players' averages, or of players without one.

    Args:
      frozen, before: the parameters that the step and Method.ahead take, on the mesh.

    Returns:
      state -> {"preview" or "samples": uint8 [H, W, C]}; nothing on processes but the first.
    """
    batch: Any = setting.preview
    if setting.method.ahead is not None:
        batch = jax.device_get(jax.jit(setting.method.ahead)(before, batch))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def images(players, frozen, batch):
        return objective.pictures(players, frozen, batch, setting.preview_count)

    def draw_pictures(state: TrainState) -> dict[str, np.ndarray]:
        players = {name: player.averaged for name, player in state.players.items()}
        found = images(players, frozen, batch)
        if jax.process_index():
            return {}
        found = jax.device_get(found)
        if "samples" in found:
            samples = to_uint8(found["samples"])
            return {
                "samples": grid(samples, columns=COLUMNS, scale=viewing_scale(samples.shape[1]))
            }
        shown = [
            signed(found[name]) if name == "gradient" else to_uint8(found[name])
            for name in ROWS
            if name in found
        ]
        scale = viewing_scale(shown[0].shape[1])
        return {"preview": grid(np.concatenate(shown), columns=len(shown[0]), scale=scale)}

    return draw_pictures
