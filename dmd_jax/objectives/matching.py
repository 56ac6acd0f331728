"""The matching loss and the regression on pairs (arXiv 2311.18828) for any networks.

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

from dmd_jax.method import losses, samplers
from dmd_jax.method.schedules import NoiseSchedule, expand, forward_diffusion
from dmd_jax.method.types import Denoise, Generate, Params
from dmd_jax.objectives.draws import Draws
from dmd_jax.objectives.objective import check_batch

# What each key of a batch is, for an error.
_MEANINGS = {
    "z": "fresh latents [B, ...]",
    "cond": "their conditions: None, or a tree of arrays [B, ...]",
    "y_ref": "the teacher's images of the pairs [R, ...]",
    "cond_ref": "the pairs' conditions: None, or a tree of arrays [R, ...]",
}


class Networks(NamedTuple):
    """The functions of the three roles; their parameters are given apart."""

    generate: Generate
    teacher: Denoise
    fake_score: Denoise


def one_architecture(denoise: Denoise, schedule: NoiseSchedule) -> Networks:
    """The method's usual case: all three roles are one denoiser.

    The generator is the denoiser held at the schedule's last level, on `prior_scale * z`.
    """

    return Networks(
        generate=functools.partial(samplers.one_step, denoise, schedule=schedule),
        teacher=denoise,
        fake_score=denoise,
    )


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
    check_batch(batch, ("z", "cond"), "the matching loss", _MEANINGS)
    if regression_weight:
        needed = ("y_ref", "cond_ref") if "z_ref" in batch else ("y_ref",)
        purpose = f"the regression, whose weight is {regression_weight:g}"
        check_batch(batch, needed, purpose, _MEANINGS)
    x = networks.generate(params, batch["z"], batch["cond"])
    loss, metrics, pictures = jnp.zeros(()), {}, {"x": x}
    if matching_weight:
        matching, aux = matching_loss(
            *(x, draws, batch["cond"]),
            networks=networks,
            teacher_params=teacher_params,
            fake_score_params=fake_score_params,
            use_fake_score=use_fake_score,
            weighting=weighting,
            alpha_factor=alpha_factor,
        )
        loss = matching_weight * matching
        metrics |= aux["metrics"]
        pictures |= aux["pictures"]
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


def matching_loss(
    x: jax.Array,
    draws: Draws,
    cond: Any,
    *,
    networks: Networks,
    teacher_params: Params,
    fake_score_params: Params,
    use_fake_score: bool = True,
    sample_weight: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, dict[str, Any]]:
    """The matching loss of samples that a generator made (Eq. 7 and 8).

    Args:
      x: generator samples [B, ...], which the gradient goes to. draws: levels and noise.
      cond: their conditions: None, or a tree of arrays [B, ...].
      networks, teacher_params, fake_score_params, use_fake_score: as for generator_loss.
      sample_weight: [B], which each sample's gradient is multiplied by; None for 1.
      options: of losses.distribution_matching_gradient.

    Returns:
      (loss, aux). aux holds "metrics", a dict of scalars; and "pictures", the images behind it.
    """
    held = jax.lax.stop_gradient(x)
    x_t = forward_diffusion(held, draws.noise, draws.level)
    denoised_real = networks.teacher(teacher_params, x_t, draws.level, cond)
    denoised_fake = held
    if use_fake_score:
        denoised_fake = networks.fake_score(fake_score_params, x_t, draws.level, cond)
    gradient, nonfinite = losses.distribution_matching_gradient(
        held,
        denoised_real,
        denoised_fake,
        level=draws.level,
        **options,
    )
    if sample_weight is not None:
        gradient = expand(sample_weight, gradient) * gradient
    loss = losses.distribution_matching_loss(x, gradient)
    norms = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=tuple(range(1, x.ndim))))
    metrics = {
        "dm_gradient_norm": norms.mean(),
        "mean_abs_real_minus_x": jnp.abs(denoised_real - held).mean(),
        # A mean as the others, so that micro-batches average alike: elements zeroed per sample.
        "dm_nonfinite": nonfinite.astype(jnp.float32).mean(),
        "loss_matching": loss,
    }
    pictures = {
        "x_t": x_t,
        "denoised_real": denoised_real,
        "denoised_fake": denoised_fake,
        "gradient": gradient,
    }
    return loss, {"metrics": metrics, "pictures": pictures}
