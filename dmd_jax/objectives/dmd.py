"""Distribution matching distillation (arXiv 2311.18828): Algorithm 1 as an Objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import losses
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import NoiseLevel
from dmd_jax.method.types import Params
from dmd_jax.objectives.data_rows import cond_of, fresh_cond, pair_needs
from dmd_jax.objectives.denoising import fake_score_loss
from dmd_jax.objectives.draws import Draws, check_bins, draw
from dmd_jax.objectives.matching import Networks, generator_loss, join_pairs
from dmd_jax.objectives.objective import Batch, Keys, Need, Objective, Player, Seen, View, need
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.objectives.pictures import one_by_one, shown
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Frozen, Teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD:
    """The settings of the method, or of a stage of a run, with the paper's values for CIFAR-10."""

    batch_size: int  # B, the samples of the matching loss and of the fake score
    regression_batch_size: int = option(392, least=1, staged=True)  # R, the pairs
    # The pairs' latents are among the B, so that B - R are fresh, as for Stable Diffusion.
    match_reference: bool = option(False)
    matching_weight: float = option(1.0, least=0)
    regression_weight: float = option(0.25, least=0, staged=True)
    distance: str = option("lpips", choices=("lpips", "l2"))  # of the regression
    weighting: str = option("normalized", choices=losses.WEIGHTINGS)
    alpha_factor: bool = option(False)  # Eq. 8's alpha_t, which Algorithm 2 leaves out
    use_fake_score: bool = option(True)  # False matches the real score alone, as in Figure 3a
    # Bins of the schedule that the matching loss draws from, both included.
    min_index: int = option(20, least=0, staged=True)
    max_index: int = option(980, least=0, staged=True)
    generator_every: int = option(1, least=1)  # the generator updates on each n-th step
    ema_decay: float = option(0.0, least=0, below=1)  # of the generator's average; 0 keeps none


class _Parts(NamedTuple):
    """What the functions of the objective have in common."""

    settings: DMD
    teacher: Teacher
    networks: Networks
    lpips: Callable[[Frozen, jax.Array, jax.Array], jax.Array] | None
    fake_weight: Callable[[NoiseLevel], jax.Array]
    preview_key: jax.Array


def dmd(
    settings: DMD,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    lpips: Callable[[Frozen, jax.Array, jax.Array], jax.Array] | None = None,
    fake_weight: Callable[[NoiseLevel], jax.Array] = losses.edm_weight,
    preview_key: jax.Array,
) -> Objective:
    """The players "generator" and "fake_score"; the latter only where the matching loss asks it.

    The generator descends the matching loss plus the regression loss; the fake score descends the
    denoising loss on the same x, so on samples of the generator before its update.

    Args:
      networks: the function `teacher` in it takes all that the step only reads, not only the
        teacher's own parameters.
      init, optimizers: of both players, by name.
      lpips: (frozen, x, y) -> [B], where it is the distance of the regression.
      fake_weight: level -> [B], the denoising loss's weight.
      preview_key: of what is random in the pictures.

    Raises:
      UserError: bins that the teacher's schedule does not have, or LPIPS asked for and not given.
    """
    _check(settings, teacher, lpips)
    parts = _Parts(settings, teacher, networks, lpips, fake_weight, preview_key)
    players = {
        "generator": Player(
            init=init["generator"],
            loss=functools.partial(_generator, parts),
            optimizer=optimizers["generator"],
            every=settings.generator_every,
            ema_decay=settings.ema_decay,
        )
    }
    if _asks_fake_score(settings):
        players["fake_score"] = Player(
            init=init["fake_score"],
            loss=functools.partial(_fake_score, parts),
            optimizer=optimizers["fake_score"],
        )
    return Objective(
        players=players,
        kept="generator",
        batch_size=settings.batch_size,
        needs=_needs(settings, teacher),
        rows=functools.partial(_rows, parts),
        pictures=functools.partial(_pictures, parts),
    )


def _check(settings: DMD, teacher: Teacher, lpips: Callable | None) -> None:
    check_bins(settings.min_index, settings.max_index, teacher.schedule)
    if not settings.matching_weight and not settings.regression_weight:
        raise UserError(
            "matching_weight and regression_weight are 0; expected one of them to be more, as "
            "nothing is trained else"
        )
    if settings.distance == "lpips" and settings.regression_weight and lpips is None:
        raise UserError("distance is lpips, and no lpips is given; expected one, or distance l2")


def _asks_fake_score(settings: DMD) -> bool:
    return bool(settings.matching_weight) and settings.use_fake_score


def _fresh(settings: DMD) -> int:
    """How many latents of a step are no pair's."""
    return settings.batch_size - settings.match_reference * settings.regression_batch_size


def _rows(parts: _Parts, keys: Keys, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """What the generator sees, and the draws of both losses."""
    settings, teacher = parts.settings, parts.teacher
    fresh = _fresh(settings)
    z = jax.random.normal(keys(Role.LATENTS), (fresh, *teacher.sample_shape), jnp.float32)
    cond = fresh_cond(teacher, keys(Role.LABELS), frozen, batch, fresh)
    rows = {"z": z, "cond": cond}
    if "pairs" in batch:
        pairs = batch["pairs"]
        cond_ref = cond_of(teacher, frozen, pairs)
        rows["y_ref"] = pairs["y_ref"]
        if settings.match_reference:
            rows["z"] = join_pairs(z, pairs["z_ref"])
            rows["cond"] = jax.tree.map(join_pairs, cond, cond_ref)
        else:
            rows |= {"z_ref": pairs["z_ref"], "cond_ref": cond_ref}
    shape = (settings.batch_size, *teacher.sample_shape)
    rows["matching"] = _matching_draws(parts, keys(Role.MATCHING), shape)
    if _asks_fake_score(settings):
        rows["fake"] = draw(keys(Role.FAKE_SCORE), shape, schedule=teacher.schedule)
    return rows


def _matching_draws(parts: _Parts, key: jax.Array, shape: tuple[int, ...]) -> Draws:
    settings = parts.settings
    return draw(
        key,
        shape,
        schedule=parts.teacher.schedule,
        min_index=settings.min_index,
        max_index=settings.max_index,
    )


def _loss(
    parts: _Parts,
    params: Params,
    players: Mapping[str, Params],
    frozen: Frozen,
    rows: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
    """`generator_loss` with the settings."""
    settings, distance = parts.settings, None
    if settings.distance == "lpips" and parts.lpips is not None:
        distance = functools.partial(parts.lpips, frozen)
    return generator_loss(
        params,
        rows["matching"],
        rows,
        networks=parts.networks,
        teacher_params=frozen,
        fake_score_params=players.get("fake_score"),
        matching_weight=settings.matching_weight,
        regression_weight=settings.regression_weight,
        weighting=settings.weighting,
        alpha_factor=settings.alpha_factor,
        use_fake_score=settings.use_fake_score,
        distance=distance,
    )


def _generator(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    loss, aux = _loss(parts, params, view.players, view.frozen, view.rows)
    return loss, Seen(metrics=aux["metrics"], shared={"x": aux["x"]})


def _fake_score(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    loss = fake_score_loss(
        params,
        view.rows["fake"],
        {"x0": view.shared["x"], "cond": view.rows["cond"]},
        denoise=parts.networks.fake_score,
        weight=parts.fake_weight,
    )
    return loss, Seen(metrics={"loss_fake_score": loss})


def _pictures(
    parts: _Parts, players: Mapping[str, Params], frozen: Frozen, batch: Batch, count: int
) -> dict[str, jax.Array]:
    """The images behind the loss, always of the same latents and levels."""
    rows = batch["pairs"] if "pairs" in batch else batch["prompts"]
    cond = cond_of(parts.teacher, frozen, rows)
    shape = (count, *parts.teacher.sample_shape)
    latents_key, draw_key = jax.random.split(parts.preview_key)
    seen = {
        "matching": _matching_draws(parts, draw_key, shape),
        "z": jax.random.normal(latents_key, shape, jnp.float32),
        "cond": cond,
    }
    if "pairs" in batch:
        seen |= {"z_ref": rows["z_ref"], "y_ref": rows["y_ref"], "cond_ref": cond}

    def of_one(example: dict[str, Any]) -> dict[str, jax.Array]:
        _, aux = _loss(parts, players["generator"], players, frozen, example)
        return shown(aux["pictures"], example["matching"], parts.teacher, frozen)

    return one_by_one(of_one, seen)


def _needs(settings: DMD, teacher: Teacher) -> dict[str, Need]:
    """Pairs where they are regressed on or matched, prompts where tokens cannot be drawn."""
    needs = {}
    if settings.match_reference or settings.regression_weight:
        # Pairs among the matching loss's samples are the fake score's as well, on every step.
        every = 1 if settings.match_reference else settings.generator_every
        needs |= pair_needs(teacher, settings.regression_batch_size, every=every)
    if teacher.draw_tokens is None:
        needs["prompts"] = need(_fresh(settings), teacher.tokens)
    return needs
