"""Score identity distillation (arXiv 2404.04057): gradients through both scores, and no data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import losses, samplers
from dmd_jax.method.consistency import karras_level
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import NoiseLevel, forward_diffusion
from dmd_jax.method.types import Params
from dmd_jax.objectives.data_rows import cond_of, fresh_cond
from dmd_jax.objectives.denoising import fake_score_loss
from dmd_jax.objectives.draws import Draws, draw_lognormal
from dmd_jax.objectives.matching import Networks
from dmd_jax.objectives.objective import Batch, Keys, Objective, Player, Seen, View
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.objectives.pictures import one_by_one, shown
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Frozen, Teacher

_TIMES = 1000.0  # of which `max_time` is some
_ROLES = {"generator": (Role.LATENTS, Role.LABELS), "fake": (Role.FAKE_LATENTS, Role.FAKE_LABELS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiD:
    """The settings of the method, with the paper's values."""

    batch_size: int  # B, the samples of each loss
    a: float = option(1.2)  # alpha in the paper: how much of the fake score's error is taken off
    sigma_init: float = option(2.5, above=0)  # the level that the generator is held at
    # The loss draws levels from the lowest `max_time` of 1000 parts of Karras' curve.
    max_time: float = option(800.0, above=0, most=_TIMES)
    loss_scale: float = option(100.0, above=0)  # of the generator
    p_mean: float = option(-1.2)  # ln(sigma) ~ N(p_mean, p_std^2), of the fake score
    p_std: float = option(1.2, above=0)
    ema_decay: float = option(0.999, least=0, below=1)  # of the generator's average; 0 keeps none


class _Parts(NamedTuple):
    """What the functions of the objective have in common."""

    settings: SiD
    teacher: Teacher
    networks: Networks
    fake_weight: Callable[[NoiseLevel], jax.Array]
    preview_key: jax.Array


def sid(
    settings: SiD,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    fake_weight: Callable[[NoiseLevel], jax.Array] = losses.edm_weight,
    preview_key: jax.Array,
) -> Objective:
    """The players "fake_score" and "generator", in this order.

    The fake score updates on samples of its own. The generator then descends `losses.sid_loss` on
    other samples, by the fake score after its update; gradients flow through both scores.

    Args:
      networks, init, optimizers: as for objectives.dmd. The generator is the teacher's denoiser
        held at `sigma_init`.

    Raises:
      UserError: a teacher of text or whose schedule is not EDM's, or a level that it does not have.
    """
    schedule = teacher.schedule
    low, high = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    if float(schedule.alphas[-1]) != 1:
        raise UserError("SiD is for EDM's schedule, alpha = 1; expected a teacher with it")
    if teacher.draw_tokens is None:
        raise UserError("SiD draws its conditions; expected a teacher of labels or of none")
    if not low <= settings.sigma_init <= high:
        raise UserError(f"sigma_init={settings.sigma_init:g}; expected {low:g} to {high:g}")
    parts = _Parts(settings, teacher, networks, fake_weight, preview_key)
    return Objective(
        players={
            "fake_score": Player(
                init=init["fake_score"],
                loss=functools.partial(_fake_score, parts),
                optimizer=optimizers["fake_score"],
            ),
            "generator": Player(
                init=init["generator"],
                loss=functools.partial(_generator, parts),
                optimizer=optimizers["generator"],
                ema_decay=settings.ema_decay,
            ),
        },
        kept="generator",
        batch_size=settings.batch_size,
        needs={},
        rows=functools.partial(_rows, parts),
        pictures=functools.partial(_pictures, parts),
    )


def _rows(parts: _Parts, keys: Keys, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """Latents and conditions of both players, and the draws of both losses."""
    settings, teacher = parts.settings, parts.teacher
    shape = (settings.batch_size, *teacher.sample_shape)
    rows: dict[str, Any] = {}
    for name, (latents, labels) in _ROLES.items():
        rows[name] = {
            "z": jax.random.normal(keys(latents), shape, jnp.float32),
            "cond": fresh_cond(teacher, keys(labels), frozen, batch, settings.batch_size),
        }
    rows["generator"]["draws"] = _levels(settings, keys(Role.MATCHING), shape)
    rows["fake"]["draws"] = draw_lognormal(
        keys(Role.FAKE_SCORE), shape, mean=settings.p_mean, std=settings.p_std
    )
    return rows


def _levels(settings: SiD, key: jax.Array, shape: tuple[int, ...]) -> Draws:
    """Levels uniform along the lower part of Karras' curve, and N(0, I)."""
    level_key, noise_key = jax.random.split(key)
    part = jax.random.uniform(level_key, shape[:1], jnp.float32) * settings.max_time / _TIMES
    return Draws(karras_level(1 - part), jax.random.normal(noise_key, shape, jnp.float32))


def _generate(parts: _Parts, params: Params, z: jax.Array, cond: Any) -> jax.Array:
    schedule, sigma = parts.teacher.schedule, parts.settings.sigma_init
    return samplers.one_step(parts.teacher.denoise, params, z, cond, schedule=schedule, sigma=sigma)


def _fake_score(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    rows = view.rows["fake"]
    loss = fake_score_loss(
        params,
        rows["draws"],
        {
            "x0": _generate(parts, view.players["generator"], rows["z"], rows["cond"]),
            "cond": rows["cond"],
        },
        denoise=parts.networks.fake_score,
        weight=parts.fake_weight,
    )
    return loss, Seen(metrics={"loss_fake_score": loss})


def _scores(
    parts: _Parts,
    x: jax.Array,
    draws: Draws,
    cond: Any,
    frozen: Frozen,
    fake_score: Params,
) -> dict[str, jax.Array]:
    """x_t, and what both scores make of it."""
    x_t = forward_diffusion(x, draws.noise, draws.level)
    return {
        "x_t": x_t,
        "denoised_real": parts.networks.teacher(frozen, x_t, draws.level, cond),
        "denoised_fake": parts.networks.fake_score(fake_score, x_t, draws.level, cond),
    }


def _generator(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    settings, rows = parts.settings, view.rows["generator"]
    x = _generate(parts, params, rows["z"], rows["cond"])
    fake_score = view.players["fake_score"]
    seen = _scores(parts, x, rows["draws"], rows["cond"], view.frozen, fake_score)
    value = losses.sid_loss(x, seen["denoised_real"], seen["denoised_fake"], a=settings.a)
    loss = settings.loss_scale * value.mean()
    apart = jnp.abs(seen["denoised_real"] - seen["denoised_fake"]).mean()
    return loss, Seen(metrics={"loss_generator": loss, "mean_abs_real_minus_fake": apart})


def _pictures(
    parts: _Parts, players: Mapping[str, Params], frozen: Frozen, batch: Batch, count: int
) -> dict[str, jax.Array]:
    """Samples and what both scores make of them, always of the same latents and levels."""
    shape = (count, *parts.teacher.sample_shape)
    latents_key, draw_key = jax.random.split(parts.preview_key)
    rows = {
        "z": jax.random.normal(latents_key, shape, jnp.float32),
        "cond": cond_of(parts.teacher, frozen, batch["prompts"]),
        "draws": _levels(parts.settings, draw_key, shape),
    }

    def of_one(example: dict[str, Any]) -> dict[str, jax.Array]:
        draws, cond = example["draws"], example["cond"]
        x = _generate(parts, players["generator"], example["z"], cond)
        seen = _scores(parts, x, draws, cond, frozen, players["fake_score"])
        return shown({"x": x} | seen, draws, parts.teacher, frozen)

    return one_by_one(of_one, rows)
