"""Samplers for networks trained on discrete timesteps, as Stable Diffusion's are.

Each is a pure function (denoise, params, z, cond, *, schedule, num_steps, ...) -> x0 that is
jittable; everything but params, z and cond is static. The network is compiled once, whatever
num_steps is. Options that all of them have:

  denoise: denoise(params, x_t, level, cond) -> x0, whatever its network predicts; with guidance
    it is `guided(denoise, guidance)` and cond the pair (cond, uncond).
  z: standard normal noise [B, ...], of which the sampler starts at schedule.prior_scale * z.
  schedule: the T levels that the network was trained on.
  num_steps: 1 to T.
  timestep_spacing: where in 0..T-1 the network is evaluated. "leading": multiples of T // num_steps
    from zero on, plus steps_offset; "trailing": T - 1 and then every T / num_steps; "linspace":
    evenly over both ends. The multistep solvers, `dpm_solver_pp` and `unipc`, lay out one timestep
    more and leave out the lowest for "leading" and "linspace". "leading" begins below T - 1, and
    one step of it is at steps_offset: to sample in one step use "trailing".
  final_alpha_one: whether the last step ends at alpha = 1, the clean image; it ends at the
    schedule's least noise otherwise. diffusers calls it set_alpha_to_one for `ddim` and `pndm`,
    and final_sigmas_type ("zero" or "sigma_min") for the others.

Each returns the last sample, float32 of z's shape, and raises UserError for a num_steps or a
timestep_spacing that is none of these, or timesteps outside of the schedule. Timesteps and the
numbers of a step are those of diffusers' schedulers of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule
from dmd_jax.method.types import Denoise, Params

SPACINGS = ("leading", "trailing", "linspace")

# What a sampler remembers and what the network has just answered are linear in each other in all
# of these methods. The functions below write a quantity as the vector of its coefficients on
# (memory..., x0), so that the published formulas can be read, and a step becomes a small matrix.
# Memory begins with the x_t that the network is evaluated at.


def ddim(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_one: bool = False,
) -> jax.Array:
    """DDIM without noise (arXiv 2010.02502, Eq. 12 with sigma = 0); num_steps evaluations.

    A step ends T // num_steps below where it began, as in diffusers; under "linspace", or where
    num_steps does not divide T, that is not quite the next timestep.
    """
    alpha, sigma = _levels(schedule, final_alpha_one)
    times = _timesteps(schedule, num_steps, timestep_spacing, steps_offset, points=num_steps)
    x, x0 = np.eye(2)
    updates = []
    for t in times:
        end = max(t - schedule.num_levels // num_steps, -1)
        noise = (x - alpha[t] * x0) / sigma[t]
        updates.append([alpha[end] * x0 + sigma[end] * noise])
    return _integrate(denoise, params, z, cond, schedule, times, updates)


def pndm(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_one: bool = False,
) -> jax.Array:
    """The pseudo linear multistep method (arXiv 2202.09778, Eq. 9 and 12) as Stable Diffusion's.

    Without the Runge-Kutta start of the paper (diffusers' skip_prk_steps): the first step is
    taken twice, the second time with the mean of the noise predicted at its two ends. Uses
    num_steps + 1 evaluations, 1 if num_steps is 1. Steps are as long as `ddim`'s. The noise is
    what is extrapolated, for every kind of network; diffusers extrapolates v where the network
    predicts v.
    """
    alpha, sigma = _levels(schedule, final_alpha_one)
    times = _timesteps(schedule, num_steps, timestep_spacing, steps_offset, points=num_steps)
    times = np.concatenate([times[:2], times[1:]])
    length = schedule.num_levels // num_steps
    x, start, e1, e2, e3, x0 = np.eye(6)
    updates = []
    for i, t in enumerate(times):
        begin, end = t, max(t - length, -1)
        noise = (x - alpha[t] * x0) / sigma[t]
        origin, past = x, (noise, e1, e2)
        if i == 0:
            slope = noise
        elif i == 1:
            begin, end = t + length, t
            slope, origin, past = (noise + e1) / 2, start, (e1, e2, e3)
        elif i == 2:
            slope = (3 * noise - e1) / 2
        elif i == 3:
            slope = (23 * noise - 16 * e1 + 5 * e2) / 12
        else:
            slope = (55 * noise - 59 * e1 + 37 * e2 - 9 * e3) / 24
        scale = alpha[end] / alpha[begin]
        following = scale * origin + (sigma[end] - scale * sigma[begin]) * slope
        updates.append([following, x, *past])
    return _integrate(denoise, params, z, cond, schedule, times, updates)


def dpm_solver_pp(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_one: bool = True,
) -> jax.Array:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2); num_steps evaluations.

    The first step is of first order, and the last one if num_steps < 15 or final_alpha_one.
    """
    alpha, sigma = _levels(schedule, final_alpha_one)
    times = _timesteps(schedule, num_steps, timestep_spacing, steps_offset, points=num_steps + 1)
    half_log_snr = _half_log_snr(alpha, sigma)
    x, last_x0, x0 = np.eye(3)
    updates = []
    for i, (t, end) in enumerate(zip(times, [*times[1:], -1])):
        h = half_log_snr[end] - half_log_snr[t]
        is_first_order = i == 0 or (end == -1 and (num_steps < 15 or final_alpha_one))
        if is_first_order:
            mean = x0
        else:
            last_h = half_log_snr[t] - half_log_snr[times[i - 1]]
            mean = x0 + h / (2 * last_h) * (x0 - last_x0)
        updates.append([sigma[end] / sigma[t] * x - alpha[end] * np.expm1(-h) * mean, x0])
    return _integrate(denoise, params, z, cond, schedule, times, updates)


def unipc(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    *,
    schedule: NoiseSchedule,
    num_steps: int,
    timestep_spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_one: bool = True,
) -> jax.Array:
    """UniPC of order 2 on x0, B2(h) = e^h - 1 (arXiv 2302.04867).

    An evaluation serves the corrector of the step that led there and the predictor of the next,
    so num_steps suffice. The first and the last step predict with first order.
    """
    alpha, sigma = _levels(schedule, final_alpha_one)
    times = _timesteps(schedule, num_steps, timestep_spacing, steps_offset, points=num_steps + 1)
    half_log_snr = _half_log_snr(alpha, sigma)
    x, start, x0_1, x0_2, x0 = np.eye(5)  # start: where x came from; x0_1, x0_2: predicted before
    updates = []
    order = h = ratio = None  # of the step that led to x
    for i, (t, end) in enumerate(zip(times, [*times[1:], -1])):
        corrected = x
        if i > 0:
            weight, last_weight = _corrector_weights(h, ratio, order)
            slope = weight * (x0 - x0_1) + last_weight * (x0_2 - x0_1)
            last = times[i - 1]
            corrected = sigma[t] / sigma[last] * start - alpha[t] * np.expm1(-h) * (x0_1 + slope)
        order = min(2, i + 1, num_steps - i)
        last_h, h = h, half_log_snr[end] - half_log_snr[t]
        ratio = -last_h / h if order == 2 else None
        mean = x0 if order == 1 else x0 + (x0_1 - x0) / (2 * ratio)
        predicted = sigma[end] / sigma[t] * corrected - alpha[end] * np.expm1(-h) * mean
        updates.append([predicted, corrected, x0, x0_1])
    return _integrate(denoise, params, z, cond, schedule, times, updates)


def _corrector_weights(h: float, ratio: float | None, order: int) -> tuple[float, float]:
    """UniC's weights on the differences of x0 at the step's end and at the point before it.

    The second is already divided by ratio, that point's distance from the step's start in units
    of h (negative). For order 1 there is no such point and the method's authors fix the other.
    """
    if order == 1:
        return 0.5, 0.0
    phi2 = np.expm1(-h) / -h - 1
    phi3 = phi2 / -h - 1 / 2
    moments = np.array([phi2, 2 * phi3]) / np.expm1(-h)
    before, at_end = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], moments)
    return at_end, before / ratio


def _levels(schedule: NoiseSchedule, final_alpha_one: bool) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, float64 [T + 1]; the last, at index -1, is where sampling ends."""
    alpha, sigma = np.float64(schedule.alphas), np.float64(schedule.sigmas)
    final = (1.0, 0.0) if final_alpha_one else (alpha[0], sigma[0])
    return np.append(alpha, final[0]), np.append(sigma, final[1])


def _half_log_snr(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """lambda = ln(alpha / sigma), infinite where sigma is 0."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def _timesteps(
    schedule: NoiseSchedule, num_steps: int, spacing: str, offset: int, *, points: int
) -> np.ndarray:
    """The num_steps timesteps, descending, int [num_steps]; points are laid out over T."""
    total = schedule.num_levels
    if not 1 <= num_steps <= total:
        raise UserError(f"num_steps is {num_steps}; expected 1 to {total}")
    if spacing == "leading":
        times = np.arange(points)[::-1][:num_steps] * (total // points) + offset
    elif spacing == "trailing":
        times = np.arange(total, 0, -total / num_steps).round()[:num_steps] - 1
    elif spacing == "linspace":
        times = np.linspace(0, total - 1, points).round()[::-1][:num_steps]
    else:
        raise UserError(f"timestep_spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}")
    if times[0] >= total or times[-1] < 0 or np.any(np.diff(times) >= 0):
        raise UserError(
            f"num_steps {num_steps} with timestep_spacing {spacing!r} and steps_offset {offset} "
            f"gives timesteps from {times[0]:.0f} to {times[-1]:.0f}; expected {num_steps} "
            f"different ones in 0 to {total - 1}"
        )
    return times.astype(np.int32)


def _integrate(
    denoise: Denoise,
    params: Params,
    z: jax.Array,
    cond,
    schedule: NoiseSchedule,
    times: np.ndarray,
    updates: Sequence[Sequence[np.ndarray]],
) -> jax.Array:
    """Evaluates at `times`; after each, memory becomes updates[i] @ (memory..., x0)."""
    x = schedule.prior_scale * jnp.asarray(z, jnp.float32)
    matrices = np.asarray(updates, np.float32)  # [evaluations, memory, memory + 1]

    def evaluate(memory, step):
        level, matrix = step
        level = NoiseLevel(*(jnp.full(z.shape[:1], value) for value in level))
        seen = [*memory, denoise(params, memory[0], level, cond)]
        # Not a matmul, which an accelerator would round to bfloat16.
        return tuple(sum(c * value for c, value in zip(row, seen)) for row in matrix), None

    memory = (x, *[jnp.zeros_like(x)] * (matrices.shape[1] - 1))
    (x0, *_), _ = lax.scan(evaluate, memory, (schedule.level(times), matrices))
    return x0
