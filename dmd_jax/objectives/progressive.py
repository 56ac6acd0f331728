"""Progressive distillation (arXiv 2202.00512): each step two of the teacher's, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import consistency as method
from dmd_jax.method import losses
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import forward_diffusion
from dmd_jax.method.types import Params
from dmd_jax.objectives.consistency import WEIGHTS
from dmd_jax.objectives.data_rows import image_needs, real_rows, samples_of
from dmd_jax.objectives.matching import Networks
from dmd_jax.objectives.objective import Batch, Keys, Objective, Player, Seen, View
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Frozen, Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive:
    """The settings of the method."""

    batch_size: int
    first_steps: int = option(8, least=1)  # of the first student; a power of two
    # Updates after which the student becomes the teacher, and the next one makes half as many
    # steps, until it makes one. A run of fewer than log2(first_steps) times as many ends before.
    halve_every: int = option(50_000, least=1)
    distance: str = option("l2", choices=("l1", "l2"))
    level_weight: str = option("truncated_snr", choices=tuple(WEIGHTS))
    ema_decay: float = option(0.0, least=0, below=1)  # of the student's average; 0 keeps none


class _Parts(NamedTuple):
    """What the functions of the objective have in common."""

    settings: Progressive
    teacher: Teacher


def progressive(
    settings: Progressive,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    preview_key: jax.Array,
) -> Objective:
    """One player, "generator", on real images of the source "images".

    The carry of its loss is the teacher of its stage, the student of the one before, and how many
    updates there were. Each stage goes on from the student before it, with its optimiser's moments.

    Args:
      networks, init, optimizers: as for objectives.dmd, of "generator" alone.

    Raises:
      UserError: a teacher whose preconditioning is not EDM's, or a number of steps that cannot be
        halved down to one.
    """
    steps = settings.first_steps
    if steps & (steps - 1):
        raise UserError(f"first_steps={steps}; expected a power of two, which is halved down to 1")
    if teacher.sigma_data is None:
        raise UserError("progressive is for EDM's networks; expected a teacher of them")
    parts = _Parts(settings, teacher)
    player = Player(
        init=init["generator"],
        loss=functools.partial(_loss, parts),
        optimizer=optimizers["generator"],
        ema_decay=settings.ema_decay,
        carry=lambda params: {"teacher": params, "updates": jnp.zeros(())},
    )
    return Objective(
        players={"generator": player},
        kept="generator",
        batch_size=settings.batch_size,
        needs=image_needs(teacher, settings.batch_size),
        rows=functools.partial(_rows, parts),
        pictures=functools.partial(samples_of, networks.generate, teacher, preview_key),
    )


def _rows(parts: _Parts, keys: Keys, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """Real images with their conditions, a noise and a part of the path for each."""
    rows = real_rows(parts.teacher, frozen, batch)
    part_key, noise_key = jax.random.split(keys(Role.LEVELS))
    shape = rows["x0"].shape
    return rows | {
        "part": jax.random.uniform(part_key, shape[:1], jnp.float32),
        "noise": jax.random.normal(noise_key, shape, jnp.float32),
    }


def _loss(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    settings, rows, cond = parts.settings, view.rows, view.rows["cond"]
    updates = view.carry["updates"]
    # Where a stage begins, the student of the last one is its teacher; where the first one does,
    # the student still is the teacher.
    halvings = settings.first_steps.bit_length() - 1
    begins = (updates % settings.halve_every == 0) & (updates <= halvings * settings.halve_every)
    of_teacher = jax.tree.map(
        lambda old, new: jnp.where(begins, jax.lax.stop_gradient(new), old),
        view.carry["teacher"],
        params,
    )
    stage = jnp.minimum(updates // settings.halve_every, halvings)
    steps = settings.first_steps / 2.0**stage
    index = jnp.minimum(jnp.floor(rows["part"] * steps), steps - 1)
    level, middle, end = (method.karras_level((index + by) / steps) for by in (0, 0.5, 1))
    x_t = forward_diffusion(rows["x0"], rows["noise"], level)
    denoise = parts.teacher.denoise
    target = method.two_step_target(denoise, of_teacher, x_t, level, middle, end, cond)
    loss = losses.consistency_loss(
        denoise(params, x_t, level, cond),
        target,
        weight=WEIGHTS[settings.level_weight](level),
        distance=settings.distance,
    ).mean()
    metrics = {"loss_generator": loss, "student_steps": steps}
    return loss, Seen(metrics, carry={"teacher": of_teacher, "updates": updates + 1})
