"""Samplers against closed forms and against EDM's Algorithm 2 written out in NumPy.

The reference networks are sampled in models/test_edm_parity.py.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.method.samplers import euler, heun, one_step
from dmd_jax.method.schedules import NoiseSchedule

MEAN, STD = 0.3, 0.5  # of the Gaussian data whose denoiser is exact


def denoise(params, x_t, level, cond):
    del params, cond
    sigma = level.sigma[:, None]
    return (STD**2 * x_t + sigma**2 * MEAN) / (STD**2 + sigma**2)


def noise(shape=(512, 4)):
    return np.asarray(jax.random.normal(jax.random.key(0), shape))


def exact(z, sigma_max=80.0):
    """The ODE's end from sigma_max z: distances to the mean shrink like sqrt(std^2 + sigma^2)."""
    return MEAN + (sigma_max * z - MEAN) * STD / math.sqrt(STD**2 + sigma_max**2)


def algorithm2(z, num_steps, *, draw=None, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """EDM's Algorithm 2, in float64, for the Gaussian data; draw(i) is step i's noise."""
    i = np.arange(num_steps)
    t = (80 ** (1 / 7) + i / (num_steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = np.append(t, 0.0)

    def slope(x, sigma):
        return (x - (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)) / sigma

    x = 80.0 * np.asarray(z, np.float64)
    for i in range(num_steps):
        gamma = min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * draw(i)
        d = slope(x, t_hat)
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            x_next = x + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * slope(x_next, t[i + 1]))
        x = x_next
    return x


@functools.cache
def largest_error(sampler, num_steps):
    z = noise()
    x0 = jax.jit(lambda z: sampler(denoise, None, z, None, num_steps=num_steps))(z)
    return np.abs(np.asarray(x0) - exact(z)).max()


@pytest.mark.parametrize("sampler, order", [(heun, 2), (euler, 1)])
def test_order_of_convergence(sampler, order):
    errors = [largest_error(sampler, n) for n in (16, 32, 64)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.25), (errors, rates)


def test_many_steps_reach_the_closed_form():
    assert largest_error(heun, 256) < 6e-4


def test_deterministic_heun_is_algorithm_2():
    z = noise()
    x0 = heun(denoise, None, z, None, num_steps=18)
    assert x0.dtype == jnp.float32
    np.testing.assert_allclose(x0, algorithm2(z, 18), atol=2e-6)


@pytest.mark.parametrize("s_churn", [8.0, 1000.0])  # 1000 meets the limit sqrt(2) - 1
def test_churn_is_algorithm_2(s_churn):
    z, key = noise(), jax.random.key(7)
    options = dict(s_churn=s_churn, s_min=0.05, s_max=50.0, s_noise=1.007)

    def draw(i):
        return np.asarray(jax.random.normal(jax.random.fold_in(key, i), z.shape), np.float64)

    x0 = heun(denoise, None, z, None, num_steps=12, key=key, **options)
    np.testing.assert_allclose(x0, algorithm2(z, 12, draw=draw, **options), atol=1e-5)


def test_churn_keeps_the_distribution():
    z = noise((20000, 1))
    x0 = heun(denoise, None, z, None, num_steps=64, s_churn=16.0, key=jax.random.key(1))
    # Standard errors: 0.0035 of the mean, 0.0025 of the standard deviation; the latter also has
    # the 64 steps' error.
    assert abs(float(x0.mean()) - MEAN) < 0.015
    assert abs(float(x0.std()) - STD) < 0.02
    # The ODE alone would be an affine function of z.
    assert abs(np.corrcoef(np.asarray(x0)[:, 0], z[:, 0])[0, 1]) < 0.05


def test_a_key_without_churn_changes_nothing():
    z = noise()
    plain = heun(denoise, None, z, None, num_steps=5)
    keyed = heun(denoise, None, z, None, num_steps=5, key=jax.random.key(3))
    np.testing.assert_array_equal(plain, keyed)


@pytest.mark.parametrize("sampler", [heun, euler])
def test_one_step_is_the_denoiser_at_sigma_max(sampler):
    z = noise()
    expected = one_step(denoise, None, z, None, schedule=NoiseSchedule.edm())
    # x - (x - D) / sigma * sigma rounds at x's magnitude, 300 * 2^-24.
    x0 = sampler(denoise, None, z, None, num_steps=1)
    np.testing.assert_allclose(x0, expected, atol=4e-5)


def test_one_step_uses_the_schedule_given():
    seen = []

    def record(params, x_t, level, cond):
        seen.append((x_t, level, cond))
        return x_t

    schedule = NoiseSchedule.scaled_linear()
    z, cond = jnp.ones((2, 3)), jnp.array([4, 5])
    one_step(record, None, z, cond, schedule=schedule)
    ((x_t, level, given),) = seen
    np.testing.assert_array_equal(x_t, z)
    np.testing.assert_array_equal(level.time, [999, 999])
    np.testing.assert_array_equal(given, cond)


@pytest.mark.parametrize("sampler, evaluations", [(heun, 35), (euler, 18)])
def test_the_network_is_traced_once_and_run_as_often_as_needed(sampler, evaluations):
    traces, runs = [], []

    def counted(params, x_t, level, cond):
        traces.append(1)
        jax.debug.callback(lambda sigma: runs.append(float(sigma[0])), level.sigma, ordered=True)
        return denoise(params, x_t, level, cond)

    jax.jit(lambda z: sampler(counted, None, z, None, num_steps=18))(noise()).block_until_ready()
    jax.effects_barrier()
    assert len(traces) == 1
    assert len(runs) == evaluations
    assert runs[0] == 80.0 and runs[-1] == np.float32(0.002)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "num_steps is 0; expected at least 1"),
        ({"num_steps": 2, "s_churn": 1.0}, "expected a key"),
        ({"num_steps": 2, "sigma_min": 0.0}, "expected 0 < sigma_min <= sigma_max"),
    ],
)
def test_bad_options_are_refused(options, message):
    for sampler in (heun, euler):
        with pytest.raises(UserError, match=message):
            sampler(denoise, None, noise(), None, **options)
