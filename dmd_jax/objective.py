"""The generator's and the fake score's objectives, for any networks.

Pure functions of (params, draws, batch): all that is random, the levels and the noise, comes in as
`Draws`, so that a step can be split into micro-batches and compared with stored numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax import losses, samplers
from dmd_jax.errors import UserError
from dmd_jax.schedules import NoiseLevel, NoiseSchedule, edm_level, forward_diffusion
from dmd_jax.types import Denoise, Generate, Params


class Networks(NamedTuple):
    """The functions of the three roles; their parameters are given apart."""

    generate: Generate
    teacher: Denoise
    fake_score: Denoise


class Draws(NamedTuple):
    """What is random in an objective: a noise level and a noise for each example."""

    level: NoiseLevel  # arrays [B]
    noise: jax.Array  # [B, ...]


def one_architecture(denoise: Denoise, schedule: NoiseSchedule) -> Networks:
    """The method's usual case: all three roles are one denoiser.

    The generator is the denoiser held at the schedule's last level, on `prior_scale * z`.
    """

    return Networks(
        generate=functools.partial(samplers.one_step, denoise, schedule=schedule),
        teacher=denoise,
        fake_score=denoise,
    )


def draw(
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    schedule: NoiseSchedule,
    min_index: int = 0,
    max_index: int | None = None,
) -> Draws:
    """Levels uniform over the schedule's bins min_index..max_index, both included, and N(0, I).

    The paper's bins of 1000 are 20..980 for the matching loss and all for the fake score.

    Args:
      key: a JAX random key. shape: of the images, [B, ...].
    """
    level_key, noise_key = jax.random.split(key)
    stop = schedule.num_levels if max_index is None else max_index + 1
    index = jax.random.randint(level_key, shape[:1], min_index, stop, jnp.int32)
    return Draws(schedule.level(index), jax.random.normal(noise_key, shape, jnp.float32))


def draw_lognormal(
    key: jax.Array, shape: tuple[int, ...], *, mean: float = -1.2, std: float = 1.2
) -> Draws:
    """EDM's training levels, ln(sigma) ~ N(mean, std^2) (2206.00364, table 1), and N(0, I)."""
    level_key, noise_key = jax.random.split(key)
    log_sigma = mean + std * jax.random.normal(level_key, shape[:1], jnp.float32)
    noise = jax.random.normal(noise_key, shape, jnp.float32)
    return Draws(edm_level(jnp.exp(log_sigma)), noise)


def join_pairs(fresh: jax.Array, pairs: jax.Array) -> jax.Array:
    """Fresh rows [B - R, ...] and the pairs' [R, ...] as one batch [B, ...].

    They alternate in the smallest groups that have both in their proportion. A batch that is split
    over devices then stays where it is, where one behind the other would be sent about, and parts
    of whole groups are batches alike.
    """
    groups = math.gcd(len(fresh), len(pairs))
    both = [rows.reshape(groups, -1, *rows.shape[1:]) for rows in (fresh, pairs)]
    return jnp.concatenate(both, axis=1).reshape(-1, *fresh.shape[1:])


def take_pairs(x: jax.Array, count: int) -> jax.Array:
    """The pairs' `count` rows [R, ...] of a batch [B, ...] that `join_pairs` made."""
    groups = math.gcd(len(x), count)
    rows = x.reshape(groups, -1, *x.shape[1:])[:, -(count // groups) :]
    return rows.reshape(count, *x.shape[1:])


def generator_loss(
    params: Params,
    draws: Draws,
    batch: Mapping[str, Any],
    *,
    networks: Networks,
    teacher_params: Params,
    fake_score_params: Params,
    matching_weight: float = 1.0,
    regression_weight: float = 0.25,
    weighting: str = "normalized",
    alpha_factor: bool = False,
    use_fake_score: bool = True,
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """matching_weight * distribution matching + regression_weight * regression (Eq. 7 to 9).

    Args:
      params: the generator's. draws: levels and noise for the matching loss.
      batch: "z" [B, ...] and "cond" for the matching loss; with a regression weight also "z_ref",
        "y_ref" [R, ...] and "cond_ref". Without "z_ref" the pairs' R rows are among those of "z"
        and "cond" (`join_pairs`), and so in the matching loss as well: Algorithm 1 for Stable
        Diffusion. Conditions are None where there are none, else pytrees of [B, ...].
      networks, teacher_params, fake_score_params: no gradient flows into the two scores.
      weighting, alpha_factor: of `losses.distribution_matching_gradient`.
      use_fake_score: False leaves the real score alone (Figure 3a): the fake distribution is taken
        as a point at x itself, whose score has mean zero, so that mu_fake = x.
      distance: of `losses.regression_loss`.

    Raises:
      UserError: a key that `batch` lacks, by its name.

    Returns:
      (loss, aux). aux holds "x" [B, ...], the pre-update samples, for the fake score; "metrics", a
      dict of scalars; and "pictures", the images behind the loss.
    """
    _check_batch(batch, ("z", "cond"), "the matching loss")
    if regression_weight:
        needed = ("y_ref", "cond_ref") if "z_ref" in batch else ("y_ref",)
        _check_batch(batch, needed, f"the regression, whose weight is {regression_weight:g}")
    x = networks.generate(params, batch["z"], batch["cond"])
    loss, metrics, pictures = jnp.zeros(()), {}, {"x": x}
    if matching_weight:
        gradient, metrics, scores = _matching_gradient(
            jax.lax.stop_gradient(x),
            draws,
            batch["cond"],
            networks=networks,
            teacher_params=teacher_params,
            fake_score_params=fake_score_params,
            use_fake_score=use_fake_score,
            weighting=weighting,
            alpha_factor=alpha_factor,
        )
        metrics["loss_matching"] = losses.distribution_matching_loss(x, gradient)
        loss = matching_weight * metrics["loss_matching"]
        pictures |= scores
    if regression_weight:
        if "z_ref" in batch:
            x_ref = networks.generate(params, batch["z_ref"], batch["cond_ref"])
        else:
            x_ref = take_pairs(x, len(batch["y_ref"]))
        regression = losses.regression_loss(x_ref, batch["y_ref"], distance=distance).mean()
        loss = loss + regression_weight * regression
        metrics["loss_regression"] = regression
        pictures |= dict(x_ref=x_ref, y_ref=batch["y_ref"])
    metrics["loss_generator"] = loss
    return loss, {"x": jax.lax.stop_gradient(x), "metrics": metrics, "pictures": pictures}


# What each key of a batch is, for an error.
_MEANINGS = {
    "z": "fresh latents [B, ...]",
    "cond": "their conditions: None, or a tree of arrays [B, ...]",
    "x0": "clean images [B, ...]",
    "y_ref": "the teacher's images of the pairs [R, ...]",
    "cond_ref": "the pairs' conditions: None, or a tree of arrays [R, ...]",
}


def _check_batch(batch: Mapping[str, Any], keys: tuple[str, ...], purpose: str) -> None:
    """Raises a UserError that names the first key of these that the batch lacks."""
    for key in keys:
        if key not in batch:
            held = ", ".join(map(repr, batch)) or "nothing"
            raise UserError(
                f"the batch has no {key!r} but {held}; expected {_MEANINGS[key]}, for {purpose}"
            )


def _matching_gradient(
    x: jax.Array,
    draws: Draws,
    cond: Any,
    *,
    networks: Networks,
    teacher_params: Params,
    fake_score_params: Params,
    use_fake_score: bool,
    weighting: str,
    alpha_factor: bool,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Diffuses x, asks both scores, and returns the gradient, its metrics and the images."""
    x_t = forward_diffusion(x, draws.noise, draws.level)
    denoised_real = networks.teacher(teacher_params, x_t, draws.level, cond)
    denoised_fake = x
    if use_fake_score:
        denoised_fake = networks.fake_score(fake_score_params, x_t, draws.level, cond)
    gradient, nonfinite = losses.distribution_matching_gradient(
        x,
        denoised_real,
        denoised_fake,
        level=draws.level,
        weighting=weighting,
        alpha_factor=alpha_factor,
    )
    norms = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=tuple(range(1, x.ndim))))
    metrics = {
        "dm_gradient_norm": norms.mean(),
        "mean_abs_real_minus_x": jnp.abs(denoised_real - x).mean(),
        # A mean as the others, so that micro-batches average alike: elements zeroed per sample.
        "dm_nonfinite": nonfinite.astype(jnp.float32).mean(),
    }
    pictures = {
        "x_t": x_t,
        "denoised_real": denoised_real,
        "denoised_fake": denoised_fake,
        "gradient": gradient,
    }
    return gradient, metrics, pictures


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
    _check_batch(batch, ("x0", "cond"), "the denoising loss")
    x0 = jax.lax.stop_gradient(batch["x0"])
    x_t = forward_diffusion(x0, draws.noise, draws.level)
    denoised = denoise(params, x_t, draws.level, batch["cond"])
    return losses.denoising_loss(denoised, x0, weight=weight(draws.level)).mean()
