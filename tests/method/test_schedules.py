"""The schedules against the reference's table and diffusers, and the forward process's algebra."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.method.schedules import (
    NoiseLevel,
    NoiseSchedule,
    edm_level,
    forward_diffusion,
    karras_sigmas,
    score,
)


def test_edm_sigmas_equal_the_reference_table(golden):
    expected = golden("dmd_losses_edm")["karras_sigmas"]
    schedule = NoiseSchedule.edm()
    np.testing.assert_allclose(schedule.sigmas, expected, rtol=1e-6)
    np.testing.assert_array_equal(schedule.alphas, np.ones(1000))


def test_edm_anchors_of_the_paper():
    sigmas = NoiseSchedule.edm().sigmas
    anchors = {0: 0.002, 20: 0.0032316, 500: 2.52651, 980: 72.0539, 998: 79.5638, 999: 80.0}
    for index, sigma in anchors.items():
        # The paper gives six digits or fewer.
        np.testing.assert_allclose(sigmas[index], sigma, rtol=5e-6)
    assert float(sigmas[999]) == 80.0


def test_karras_sigmas_are_the_formula_in_float64():
    # Eq. 5 of arXiv 2206.00364 for three levels: the middle is the mean of the seventh roots.
    middle = ((80.0 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    np.testing.assert_allclose(karras_sigmas(3), [80.0, middle, 0.002], rtol=1e-13)


def test_scaled_linear_anchors_of_the_paper():
    schedule = NoiseSchedule.scaled_linear()
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, np.ones(1000), rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas[999] ** 2, 0.00466, rtol=1e-3)
    np.testing.assert_allclose(schedule.alphas[980], 0.076, atol=5e-4)
    assert float(schedule.generator_level(1).time[0]) == 999.0


@pytest.mark.torch
def test_scaled_linear_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    schedule = NoiseSchedule.scaled_linear()
    # The peer accumulates in float32, which leaves about 1e-5 at the noisy end.
    np.testing.assert_allclose(schedule.alphas**2, peer.alphas_cumprod.numpy(), rtol=2e-5)
    np.testing.assert_array_equal(schedule.times, np.sort(peer.timesteps.numpy()))


def test_generator_is_held_at_the_last_level():
    schedule = NoiseSchedule.edm()
    level = schedule.generator_level(3)
    np.testing.assert_array_equal(level.sigma, [80.0, 80.0, 80.0])
    assert schedule.prior_scale == 80.0
    assert NoiseSchedule.scaled_linear().prior_scale == 1.0


def test_edm_level_is_the_schedules_level():
    schedule = NoiseSchedule.edm()
    for ours, theirs in zip(edm_level(schedule.sigmas[7:9]), schedule.level(jnp.array([7, 8]))):
        np.testing.assert_array_equal(ours, theirs)


def test_score_of_the_true_clean_image_points_back_along_the_noise():
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    level = NoiseLevel(*jnp.array([[0.9, 0.5, 0.1], [0.3, 0.8, 2.0], [0.0, 1.0, 2.0]]))
    x_t = forward_diffusion(x0, noise, level)
    expected = -noise / np.array([0.3, 0.8, 2.0], np.float32)[:, None, None, None]
    # float32 cancellation of x_t - alpha x0 leaves a few units in the last place over sigma^2.
    np.testing.assert_allclose(score(x_t, x0, level), expected, rtol=1e-5, atol=1e-5)
