"""The denoising objective: the loss of a fake score, and the training of a teacher on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmd_jax.method import losses, samplers
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import NoiseLevel, forward_diffusion
from dmd_jax.method.types import Denoise, Params
from dmd_jax.objectives.data_rows import image_needs
from dmd_jax.objectives.draws import Draws, draw_lognormal
from dmd_jax.objectives.objective import (
    Batch,
    Keys,
    Objective,
    Player,
    Seen,
    View,
    check_batch,
)
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.options import option
from dmd_jax.teachers.teacher import Teacher

_MEANINGS = {
    "x0": "clean images [B, ...]",
    "cond": "their conditions: None, or a tree of arrays [B, ...]",
}


def fake_score_loss(
    params: Params,
    draws: Draws,
    batch: Mapping[str, Any],
    *,
    denoise: Denoise,
    weight: Callable[[NoiseLevel], jax.Array] = losses.edm_weight,
) -> jax.Array:
    """The denoising loss (Eq. 6): of the fake score on generator samples, of a teacher on images.

    Args:
      params: the denoiser's. draws: levels and noise, of the batch's size.
      batch: "x0" [B, ...], which no gradient reaches, and "cond".
      weight: level -> [B].

    Returns:
      The scalar mean over the batch.

    Raises:
      UserError: a key that `batch` lacks, by its name.
    """
    check_batch(batch, ("x0", "cond"), "the denoising loss", _MEANINGS)
    x0 = jax.lax.stop_gradient(batch["x0"])
    x_t = forward_diffusion(x0, draws.noise, draws.level)
    denoised = denoise(params, x_t, draws.level, batch["cond"])
    return losses.denoising_loss(denoised, x0, weight=weight(draws.level)).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """The settings of a teacher's training (arXiv 2206.00364, table 1)."""

    batch_size: int = option(512, least=1)
    p_mean: float = option(-1.2)  # ln(sigma) ~ N(p_mean, p_std^2)
    p_std: float = option(1.2, above=0)
    ema_decay: float = option(0.9999, least=0, below=1)
    preview_steps: int = option(18, least=1)  # of the sampler that makes the pictures


def denoising(
    settings: Denoising,
    teacher: Teacher,
    init: Callable[[jax.Array], Params],
    optimizer: Optimizer,
    *,
    weight: Callable[[NoiseLevel], jax.Array] = losses.edm_weight,
    preview_key: jax.Array,
) -> Objective:
    """One player, "teacher", on real images of the source "images".

    Args:
      init: key -> its parameters before the first step.
      weight: level -> [B], of the denoising loss.
      preview_key: of the latents of the pictures.
    """

    def rows(keys: Keys, frozen: Any, batch: Batch) -> dict[str, Any]:
        images = batch["images"]
        draws = draw_lognormal(
            keys(Role.TEACHER), images["x0"].shape, mean=settings.p_mean, std=settings.p_std
        )
        return {"x0": images["x0"], "cond": teacher.encode(frozen, images), "draws": draws}

    def loss(params: Params, view: View) -> tuple[jax.Array, Seen]:
        value = fake_score_loss(
            params, view.rows["draws"], view.rows, denoise=teacher.denoise, weight=weight
        )
        return value, Seen(metrics={"loss_denoising": value})

    def pictures(
        players: Mapping[str, Params], frozen: Any, batch: Batch, count: int
    ) -> dict[str, jax.Array]:
        z = jax.random.normal(preview_key, (count, *teacher.sample_shape), jnp.float32)
        cond = teacher.encode(frozen, batch["images"])
        x0 = samplers.heun(
            teacher.denoise, players["teacher"], z, cond, num_steps=settings.preview_steps
        )
        return {"samples": teacher.decode(frozen, x0)}

    player = Player(
        init=lambda frozen, key: init(key),
        loss=loss,
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
    )
    return Objective(
        players={"teacher": player},
        kept="teacher",
        batch_size=settings.batch_size,
        needs=image_needs(teacher, settings.batch_size),
        rows=rows,
        pictures=pictures,
    )
