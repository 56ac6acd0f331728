"""Samplers: from noise to images by a denoiser's probability-flow ODE, or in one step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import (
    NoiseLevel,
    NoiseSchedule,
    edm_level,
    few_step_indices,
    forward_diffusion,
    karras_sigmas,
)
from dmd_jax.method.types import Denoise, Params


def heun(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Heun's second-order sampler with EDM's optional churn (arXiv 2206.00364, Algorithm 2).

    Uses 2 num_steps - 1 evaluations: the last step, which ends at sigma = 0, has no correction.
    Pure and jittable; everything but params, z, cond and key is static. The network is compiled
    once, whatever num_steps is.

    Args:
      denoise: denoise(params, x_t, level, cond) -> x0 of an alpha = 1 (EDM) denoiser.
      z: standard normal noise [B, ...]; the sampler starts from sigma_max * z.
      cond: labels [B], or None.
      num_steps: number of Karras levels, sigma_max down to sigma_min; zero follows. 1 gives
        denoise(sigma_max * z).
      s_churn, s_min, s_max, s_noise: before each step whose sigma is in [s_min, s_max], noise is
        added that raises sigma by the factor 1 + min(s_churn / num_steps, sqrt(2) - 1), with
        standard deviation scaled by s_noise. s_churn = 0 is deterministic.
      key: needed where s_churn > 0, ignored otherwise.

    Returns:
      x0, float32 of z's shape.

    Raises:
      UserError: num_steps < 1, sigmas that do not descend to something positive, or churn
        without a key.
    """
    sigmas = _sigmas(num_steps, sigma_min, sigma_max, rho)
    steps = _steps(sigmas, s_churn, s_min, s_max, s_noise, corrected=True)
    return _integrate(denoise, params, z, cond, sigma_max, steps, s_churn, key)


def euler(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """`heun` without its correction: first order, num_steps evaluations, the same options."""
    sigmas = _sigmas(num_steps, sigma_min, sigma_max, rho)
    steps = _steps(sigmas, s_churn, s_min, s_max, s_noise, corrected=False)
    return _integrate(denoise, params, z, cond, sigma_max, steps, s_churn, key)


def one_step(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    sigma: float | None = None,
) -> jax.Array:
    """The one-step generator: the denoiser held at the schedule's last level.

    Args:
      z: standard normal noise [B, ...]. cond: labels [B], or None.
      sigma: the level of EDM's (alpha = 1) that it is held at in place of the last one; 2.5 in
        score identity distillation (arXiv 2404.04057).

    Returns:
      x0 = denoise(params, prior_scale * z, last level, cond), of z's shape; of sigma * z at sigma
      where that is given.
    """
    if sigma is not None:
        return denoise(params, sigma * z, edm_level(jnp.full(z.shape[:1], sigma)), cond)
    level = schedule.generator_level(z.shape[0])
    return denoise(params, schedule.prior_scale * z, level, cond)


def few_step(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    key: jax.Array,
) -> jax.Array:
    """A generator of several steps: predict x0, noise it to the next level, and again.

    No ODE is followed: the noise of each step is fresh. Source: arXiv 2405.14867, section 4.4.

    Args:
      z: standard normal noise [B, ...]. cond: as the denoiser takes it.
      num_steps: one of `few_step_indices`; 1 is `one_step`.
      key: of the noise between the steps (`few_step_noise`).

    Returns:
      x0 at the last of the levels, of z's shape.

    Raises:
      UserError: num_steps does not divide the schedule's levels.
    """
    noise = functools.partial(few_step_noise, key, z.shape)
    x_t, level = few_step_input(
        *(denoise, params, z, cond),
        schedule=schedule,
        num_steps=num_steps,
        step=num_steps - 1,
        noise=noise,
    )
    return denoise(params, x_t, level, cond)


def few_step_noise(key: jax.Array, shape: tuple[int, ...], step: jax.Array | int) -> jax.Array:
    """The noise that `few_step` adds before its step of that number, counted from 0."""
    return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)


def few_step_input(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    step: jax.Array | int,
    noise: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, NoiseLevel]:
    """What `few_step` feeds the denoiser at one of its steps: DMD2's backward simulation.

    Args:
      step: which of them, a scalar from 0 to num_steps - 1; it may be traced.
      noise: (step) -> the noise [B, ...] that is added before it.

    Returns:
      (x_t, the level of x_t), which no gradient flows through. Step 0 has prior_scale * z.

    Raises:
      UserError: num_steps does not divide the schedule's levels.
    """
    indices = jnp.asarray(few_step_indices(schedule.num_levels, num_steps))
    params, z, cond = jax.lax.stop_gradient((params, jnp.asarray(z, jnp.float32), cond))

    def level(step: jax.Array | int) -> NoiseLevel:
        return schedule.level(jnp.full(z.shape[:1], indices[step]))

    def advance(done: jax.Array, x_t: jax.Array) -> jax.Array:
        x0 = denoise(params, x_t, level(done), cond)
        return forward_diffusion(x0, noise(done + 1), level(done + 1))

    def advance_until(x_t: jax.Array, done: jax.Array) -> tuple[jax.Array, None]:
        # A loop of known length, of which the steps from `step` on cost nothing.
        return lax.cond(done < step, advance, lambda done, x_t: x_t, done, x_t), None

    first = schedule.prior_scale * z
    x_t, _ = lax.scan(advance_until, first, jnp.arange(num_steps - 1))
    return x_t, level(step)


class _Steps(NamedTuple):
    """One row for each evaluation of the network; arrays [number of evaluations]."""

    index: np.ndarray  # of the sampler step, for the noise's key
    noise: np.ndarray  # standard deviation of the noise added before the evaluation
    sigma: np.ndarray  # that the network is evaluated at
    length: np.ndarray  # of the step in sigma, negative
    corrects: np.ndarray  # whether the evaluation is at the end of a step already taken


def _sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """float64 [num_steps + 1], sigma_max first and zero last."""
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; expected at least 1")
    if not 0 < sigma_min <= sigma_max:
        raise UserError(
            f"sigma_min is {sigma_min} and sigma_max {sigma_max}; "
            "expected 0 < sigma_min <= sigma_max"
        )
    levels = karras_sigmas(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return np.append(levels, 0.0)


def _steps(sigmas, s_churn, s_min, s_max, s_noise, *, corrected: bool) -> _Steps:
    num_steps = len(sigmas) - 1
    rows = []
    for i, (sigma, end) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        raised = sigma * (1 + gamma)
        noise = s_noise * math.sqrt(raised**2 - sigma**2)
        rows.append((i, noise, raised, end - raised, False))
        if corrected and end > 0:
            rows.append((i, 0.0, end, end - raised, True))
    index, *floats, corrects = map(np.array, zip(*rows))
    return _Steps(index, *(column.astype(np.float32) for column in floats), corrects)


def _integrate(denoise, params, z, cond, sigma_max, steps: _Steps, s_churn, key) -> jax.Array:
    if s_churn > 0 and key is None:
        raise UserError(f"s_churn is {s_churn} and key is None; expected a key for the noise")
    z = jnp.asarray(z, jnp.float32)

    # Scanning over evaluations, not steps, puts the network into the program once: Heun's
    # predictor and corrector differ by two selects, and compilation is what costs.
    def evaluate(carry, step):
        x, start, slope = carry
        if s_churn > 0:
            step_key = jax.random.fold_in(key, step.index)
            x = x + step.noise * jax.random.normal(step_key, x.shape, jnp.float32)
        level = edm_level(jnp.full(x.shape[:1], step.sigma))
        here = (x - denoise(params, x, level, cond)) / step.sigma  # dx/dsigma
        start = jnp.where(step.corrects, start, x)
        slope = jnp.where(step.corrects, 0.5 * (slope + here), here)
        return (start + step.length * slope, start, slope), None

    x = sigma_max * z
    (x0, _, _), _ = lax.scan(evaluate, (x, x, jnp.zeros_like(x)), steps)
    return x0
