"""Rectified flow (arXiv 2209.03003): straight paths between the noises and images of pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import losses
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import edm_level, forward_diffusion
from dmd_jax.method.types import Params
from dmd_jax.objectives.data_rows import cond_of, pair_needs, samples_of
from dmd_jax.objectives.matching import Networks
from dmd_jax.objectives.objective import Batch, Keys, Objective, Player, Seen, View
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Frozen, Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow:
    """The settings of the method."""

    batch_size: int  # pairs of a step
    ema_decay: float = option(0.9999, least=0, below=1)  # of the average; 0 keeps none


def reflow(
    settings: Reflow,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    preview_key: jax.Array,
) -> Objective:
    """One player, "generator", on the pairs (z_ref, y_ref).

    At x_t = (1 - t) y + t z, t uniform, the velocity z - y is regressed on. To a network of EDM's
    this x_t is (1 - t) times y + sigma z with sigma = t / (1 - t), and with x0 for its prediction
    the velocity's squared error is |x0 - y|^2 / t^2. t ends where sigma is the schedule's last.

    Args:
      networks, init, optimizers: as for objectives.dmd, of "generator" alone.

    Raises:
      UserError: a teacher whose schedule is not EDM's.
    """
    schedule = teacher.schedule
    if teacher.sigma_data is None:
        raise UserError("reflow is for EDM's networks; expected a teacher of them")
    low, high = (float(end / (1 + end)) for end in (schedule.sigmas[0], schedule.sigmas[-1]))

    def rows(keys: Keys, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        pairs = batch["pairs"]
        count = pairs["y_ref"].shape[:1]
        t = jax.random.uniform(keys(Role.LEVELS), count, jnp.float32, low, high)
        cond = cond_of(teacher, frozen, pairs)
        return {"z": pairs["z_ref"], "y": pairs["y_ref"], "cond": cond, "t": t}

    def loss(params: Params, view: View) -> tuple[jax.Array, Seen]:
        t, y = view.rows["t"], view.rows["y"]
        level = edm_level(t / (1 - t))
        x_t = forward_diffusion(y, view.rows["z"], level)
        denoised = teacher.denoise(params, x_t, level, view.rows["cond"])
        value = losses.denoising_loss(denoised, y, weight=1 / jnp.square(t)).mean()
        return value, Seen(metrics={"loss_generator": value})

    player = Player(
        init=init["generator"],
        loss=loss,
        optimizer=optimizers["generator"],
        ema_decay=settings.ema_decay,
    )
    return Objective(
        players={"generator": player},
        kept="generator",
        batch_size=settings.batch_size,
        needs=pair_needs(teacher, settings.batch_size),
        rows=rows,
        pictures=functools.partial(samples_of, networks.generate, teacher, preview_key),
    )
