"""Samplers for discrete timesteps against closed forms.

diffusers' schedulers are the oracle in test_discrete_samplers_diffusers.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.method.discrete_samplers import ddim, dpm_solver_pp, pndm, unipc
from dmd_jax.method.samplers import one_step
from dmd_jax.method.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
SAMPLERS = {"ddim": ddim, "pndm": pndm, "dpm++": dpm_solver_pp, "unipc": unipc}
MEAN, STD = 0.3, 0.5  # of the Gaussian data whose denoiser is exact


def gaussian(params, x_t, level, cond):
    del params, cond
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def sample(name, denoise, z, num_steps, **options):
    sampler = SAMPLERS[name]
    return jax.jit(
        lambda z: sampler(denoise, None, z, None, schedule=SCHEDULE, num_steps=num_steps, **options)
    )(z)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "spacing, one", [("leading", False), ("trailing", False), ("leading", True)]
)
def test_a_known_image_is_approached_in_a_straight_line(name, spacing, one):
    image, z = normal(2, 3, 5)
    options = {"timestep_spacing": spacing, "final_alpha_one": one}
    x0 = sample(name, lambda *_: jnp.float32(image), z, 10, **options)
    begin = 999
    if spacing == "leading":
        begin = 901 if name in ("ddim", "pndm") else 10 * (1000 // 11) + 1
    # The noise in z, taken for the level it begins at, is the same to the end.
    alphas, sigmas = np.float64(SCHEDULE.alphas), np.float64(SCHEDULE.sigmas)
    noise = (z - alphas[begin] * image) / sigmas[begin]
    expected = image if one else alphas[0] * image + sigmas[0] * noise
    np.testing.assert_allclose(x0, expected, atol=3e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_that_does_not_keep_the_variance_is_sampled_too(name):
    schedule, (image, z) = NoiseSchedule.edm(), normal(2, 3, 5)
    x0 = SAMPLERS[name](
        lambda *_: jnp.float32(image),
        None,
        z,
        None,
        schedule=schedule,
        num_steps=5,
        timestep_spacing="trailing",
        final_alpha_one=False,
    )
    expected = image + float(schedule.sigmas[0]) * (z - image / 80)
    # The start is 80 z, which float32 holds to 1e-5.
    np.testing.assert_allclose(x0, expected, atol=2e-5)


@functools.cache
def error(name, num_steps):
    """The largest distance from the probability-flow ODE's end at the schedule's least noise."""
    z = normal(64, 4)
    x0 = sample(name, gaussian, z, num_steps, timestep_spacing="trailing", final_alpha_one=False)
    alpha, sigma = np.float64(SCHEDULE.alphas), np.float64(SCHEDULE.sigmas)
    std = np.sqrt(alpha**2 * STD**2 + sigma**2)
    # Along the ODE the distance to the mean is a fixed number of standard deviations.
    exact = alpha[0] * MEAN + std[0] / std[999] * (z - alpha[999] * MEAN)
    return np.abs(x0 - exact).max()


@pytest.mark.parametrize(
    "name, order, bound",
    [("ddim", 1, 0.025), ("pndm", 2, 1e-3), ("dpm++", 2, 0.01), ("unipc", 2, 5e-3)],
)
def test_the_closed_form_is_reached_at_the_order_of_the_method(name, order, bound):
    assert error(name, 200) < bound
    # The last levels are too far apart in ln(alpha / sigma) for the whole of the second order.
    rate = np.log2(error(name, 100) / error(name, 200))
    assert 0.9 < rate < 1.1 if order == 1 else rate > 1.6


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_trailing_step_is_the_one_step_generator(name):
    z = normal(3, 4)
    expected = one_step(gaussian, None, jnp.float32(z), None, schedule=SCHEDULE)
    x0 = sample(name, gaussian, z, 1, timestep_spacing="trailing", final_alpha_one=True)
    np.testing.assert_allclose(x0, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name, times",
    [
        ("ddim", [751, 501, 251, 1]),
        ("pndm", [751, 501, 501, 251, 1]),
        ("dpm++", [801, 601, 401, 201]),
        ("unipc", [801, 601, 401, 201]),
    ],
)
def test_the_network_is_traced_once_and_run_as_often_as_needed(name, times):
    traces, runs = [], []

    def counted(params, x_t, level, cond):
        traces.append(1)
        jax.debug.callback(lambda time: runs.append(float(time[0])), level.time, ordered=True)
        return gaussian(params, x_t, level, cond)

    sample(name, counted, normal(2, 3), 4).block_until_ready()
    jax.effects_barrier()
    assert len(traces) == 1
    assert runs == times


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "num_steps is 0; expected 1 to 1000"),
        ({"num_steps": 1001}, "num_steps is 1001; expected 1 to 1000"),
        (
            {"num_steps": 4, "timestep_spacing": "even"},
            "timestep_spacing is 'even'; expected one of leading, trailing, linspace",
        ),
        (
            {"num_steps": 4, "steps_offset": 300},
            "'leading' and steps_offset 300 gives timesteps from 1[01][05]0 to [35]00; expected 4 "
            "different ones in 0 to 999",
        ),
        ({"num_steps": 4, "steps_offset": -300}, "steps_offset -300 gives timesteps from"),
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS[name](gaussian, None, normal(2, 3), None, schedule=SCHEDULE, **options)


def test_more_timesteps_than_there_are_levels_are_refused():
    with pytest.raises(UserError, match="expected 1000 different ones"):
        dpm_solver_pp(gaussian, None, normal(2, 3), None, schedule=SCHEDULE, num_steps=1000)
