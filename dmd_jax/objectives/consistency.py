"""Consistency distillation and training (arXiv 2303.01469): one function for all of a path."""

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
from dmd_jax.method.schedules import NoiseLevel, forward_diffusion
from dmd_jax.method.types import Denoise, Params
from dmd_jax.objectives.data_rows import image_needs, real_rows, samples_of
from dmd_jax.objectives.matching import Networks
from dmd_jax.objectives.objective import Batch, Keys, Objective, Player, Seen, View
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Frozen, Teacher

WEIGHTS: Mapping[str, Callable[[NoiseLevel], jax.Array]] = {
    "uniform": losses.uniform_weight,
    "karras": losses.edm_weight,
    "truncated_snr": losses.truncated_snr_weight,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    """The settings of the method, with the paper's values for distillation on CIFAR-10."""

    batch_size: int
    # What the step from a level to the next is made by: one Heun step of the teacher, or an Euler
    # step to the data point itself.
    source: str = option("distillation", choices=("distillation", "training"))
    num_levels: int = option(18, least=2)  # N, of Karras' curve
    distance: str = option("lpips", choices=("lpips", "l1", "l2"))
    level_weight: str = option("uniform", choices=tuple(WEIGHTS))
    target_decay: float = option(0.95, least=0, below=1)  # of the average that makes the targets
    ema_decay: float = option(0.9999, least=0, below=1)  # of the average that is kept; 0 keeps none


class _Parts(NamedTuple):
    """What the functions of the objective have in common."""

    settings: Consistency
    teacher: Teacher
    networks: Networks
    function: Denoise  # the network with its boundary
    lpips: Callable[[Frozen, jax.Array, jax.Array], jax.Array] | None


def consistency(
    settings: Consistency,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    lpips: Callable[[Frozen, jax.Array, jax.Array], jax.Array] | None = None,
    preview_key: jax.Array,
) -> Objective:
    """One player, "generator", on real images of the source "images".

    Its function is brought to agree, at a level, with an average of itself at the next one on the
    way to the image. The average is the carry of its loss. As a generator the network is held at
    the last level, where the boundary changes it by 2.5e-5 of itself.

    Args:
      networks, init, optimizers: as for objectives.dmd, of "generator" alone.
      lpips: (frozen, x, y) -> [B], where it is the distance.

    Raises:
      UserError: a teacher whose schedule or preconditioning is not EDM's, or no LPIPS for it.
    """
    if teacher.sigma_data is None:
        raise UserError("consistency is for EDM's networks; expected a teacher of them")
    if settings.distance == "lpips" and lpips is None:
        raise UserError("distance is lpips, and no lpips is given; expected one, or l1 or l2")
    function = method.consistency_function(teacher.denoise, sigma_data=teacher.sigma_data)
    parts = _Parts(settings, teacher, networks, function, lpips)
    player = Player(
        init=init["generator"],
        loss=functools.partial(_loss, parts),
        optimizer=optimizers["generator"],
        ema_decay=settings.ema_decay,
        carry=lambda params: params,
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
    """Real images with their conditions, a noise for each, and which of the levels each is at."""
    rows = real_rows(parts.teacher, frozen, batch)
    index_key, noise_key = jax.random.split(keys(Role.LEVELS))
    shape, last = rows["x0"].shape, parts.settings.num_levels - 1
    return rows | {
        "index": jax.random.randint(index_key, shape[:1], 0, last, jnp.int32),
        "noise": jax.random.normal(noise_key, shape, jnp.float32),
    }


def _loss(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    settings, rows, last = parts.settings, view.rows, parts.settings.num_levels - 1
    # After the optimiser's last update, as the authors' code has it.
    decay = settings.target_decay
    target_params = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new, view.carry, params
    )
    target_params = jax.lax.stop_gradient(target_params)
    level, end = (method.karras_level((rows["index"] + by) / last) for by in (0, 1))
    x_t, cond = forward_diffusion(rows["x0"], rows["noise"], level), rows["cond"]
    if settings.source == "training":
        nearer = method.euler_step(x_t, rows["x0"], level, end)
    else:
        nearer = method.heun_step(parts.networks.teacher, view.frozen, x_t, level, end, cond)
    target = parts.function(target_params, nearer, end, cond)
    loss = losses.consistency_loss(
        parts.function(params, x_t, level, cond),
        target,
        weight=WEIGHTS[settings.level_weight](level),
        distance=_distance(parts, view.frozen),
    ).mean()
    return loss, Seen(metrics={"loss_generator": loss}, carry=target_params)


def _distance(parts: _Parts, frozen: Frozen) -> str | Callable[[jax.Array, jax.Array], jax.Array]:
    if parts.settings.distance == "lpips":
        return functools.partial(parts.lpips, frozen)
    return parts.settings.distance
