"""The losses against the authors' released code (golden arrays) and against Eq. 6 to 8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.method import losses
from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule, forward_diffusion, score
from dmd_jax.parallel.sharding import make_mesh


@pytest.fixture
def reference(golden):
    """The stored predictions of the authors' EDM code, as NHWC."""
    arrays = golden("dmd_losses_edm")
    return {
        name: array.transpose(0, 2, 3, 1) if array.ndim == 4 and "/" not in name else array
        for name, array in arrays.items()
        if "/" not in name
    }


def relative_error(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def test_gradient_loss_and_derivative_equal_the_reference(reference):
    level = NoiseSchedule.edm().level(jnp.asarray(reference["dm_t"]))
    x = jnp.asarray(reference["x"])
    gradient, nonfinite = losses.distribution_matching_gradient(
        x, reference["dm_pred_real"], reference["dm_pred_fake"], level=level
    )
    assert relative_error(gradient, reference["dm_grad"]) < 1e-5
    np.testing.assert_array_equal(nonfinite, np.zeros(6, np.int32))
    loss, derivative = jax.value_and_grad(losses.distribution_matching_loss)(x, gradient)
    np.testing.assert_allclose(loss, reference["dm_loss"], rtol=1e-5)
    assert relative_error(derivative, reference["dm_loss_grad_wrt_x"]) < 1e-5


def test_derivative_is_the_gradient_over_the_number_of_elements(reference):
    x, gradient = jnp.asarray(reference["x"]), jnp.asarray(reference["dm_grad"])
    derivative = jax.jit(jax.grad(losses.distribution_matching_loss))(x, gradient)
    np.testing.assert_allclose(derivative, gradient / x.size, rtol=1e-6)
    # Tiny gradients beside a large x survive: nothing is added to x and taken away again.
    tiny = 1e-6 * gradient
    derivative = jax.grad(losses.distribution_matching_loss)(100.0 + x, tiny)
    np.testing.assert_allclose(derivative, tiny / x.size, rtol=1e-6)


def test_gradient_equals_eq7_from_the_two_scores():
    rng = np.random.default_rng(1)
    x, noise, real, fake = jnp.asarray(rng.standard_normal((4, 3, 8, 8, 1)), jnp.float32)
    schedule = NoiseSchedule.scaled_linear()
    level = schedule.level(jnp.array([200, 500, 900]))
    x_t = forward_diffusion(x, noise, level)
    alpha, sigma = (np.asarray(v, np.float64)[:, None, None, None] for v in level[:2])
    difference = np.asarray(score(x_t, fake, level) - score(x_t, real, level), np.float64)
    distance = np.abs(np.asarray(real - x)).mean(axis=(1, 2, 3), keepdims=True)
    weights = {
        "normalized": sigma**2 / alpha / distance,
        "sigma_over_alpha": sigma / alpha,
        "sigma3_over_alpha": sigma**3 / alpha,
    }
    for weighting, weight in weights.items():
        found, _ = losses.distribution_matching_gradient(
            x, real, fake, level=level, weighting=weighting, alpha_factor=weighting == "normalized"
        )
        # Scores at sigma = 0.3 carry float32 rounding of about 1e-5 through the difference.
        assert relative_error(found, weight * alpha * difference) < 3e-5, weighting
    without_alpha, _ = losses.distribution_matching_gradient(x, real, fake, level=level)
    with_alpha, _ = losses.distribution_matching_gradient(
        x, real, fake, level=level, alpha_factor=True
    )
    np.testing.assert_allclose(with_alpha, alpha * without_alpha, rtol=1e-6)


def test_gradient_works_under_vmap_and_in_bfloat16(reference):
    level = NoiseSchedule.edm().level(jnp.asarray(reference["dm_t"]))
    arrays = [jnp.asarray(reference[k]) for k in ("x", "dm_pred_real", "dm_pred_fake")]

    def one(x, real, fake, level):
        return losses.distribution_matching_gradient(
            x[None], real[None], fake[None], level=jax.tree.map(lambda v: v[None], level)
        )[0][0]

    whole, _ = losses.distribution_matching_gradient(*arrays, level=level)
    np.testing.assert_allclose(jax.vmap(one)(*arrays, level), whole, rtol=1e-6)
    low = [array.astype(jnp.bfloat16) for array in arrays]
    rounded, _ = losses.distribution_matching_gradient(*low, level=level)
    assert rounded.dtype == jnp.float32
    # The inputs' rounding to 8 bits, not the loss, makes the difference: from the rounded inputs
    # in float32 the result is the same.
    same = [array.astype(jnp.float32) for array in low]
    expected, _ = losses.distribution_matching_gradient(*same, level=level)
    np.testing.assert_array_equal(rounded, expected)


def test_gradient_and_denoising_loss_work_under_shard_map():
    rng = np.random.default_rng(4)
    x, real, fake = jnp.asarray(rng.standard_normal((3, 8, 4, 4, 1)), jnp.float32)
    level = NoiseSchedule.edm().level(jnp.arange(100, 900, 100))

    def both(x, real, fake, level):
        gradient, _ = losses.distribution_matching_gradient(x, real, fake, level=level)
        return gradient, losses.denoising_loss(fake, x, weight=losses.edm_weight(level))

    rows = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(both, mesh=make_mesh(8), in_specs=rows, out_specs=rows)
    for found, expected in zip(jax.jit(split)(x, real, fake, level), both(x, real, fake, level)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_nonfinite_gradients_are_zeroed_and_counted():
    x = jnp.zeros((3, 2, 2, 1))
    real = x.at[0].set(1.0).at[1, 0, 0, 0].set(jnp.nan)
    fake = x.at[2].set(1.0)
    level = NoiseSchedule.edm().level(jnp.array([100, 200, 300]))
    gradient, nonfinite = losses.distribution_matching_gradient(x, real, fake, level=level)
    assert np.isfinite(gradient).all()
    # Sample 1's NaN reaches its normaliser, and sample 2's normaliser is zero.
    np.testing.assert_array_equal(nonfinite, [0, 4, 4])
    np.testing.assert_array_equal(gradient[0], -np.ones((2, 2, 1)))


def test_fake_loss_equals_the_reference(reference):
    level = NoiseSchedule.edm().level(jnp.asarray(reference["fake_t"]))
    loss = losses.denoising_loss(
        jnp.asarray(reference["fake_pred"]),
        jnp.asarray(reference["x"]),
        weight=losses.edm_weight(level),
    ).mean()
    np.testing.assert_allclose(loss, reference["fake_loss"], rtol=1e-5)


def test_snr_weight_makes_the_loss_the_noise_predictions_error():
    rng = np.random.default_rng(2)
    x0, noise, predicted = jnp.asarray(rng.standard_normal((3, 2, 4, 4, 1)), jnp.float32)
    level = NoiseSchedule.scaled_linear().level(jnp.array([300, 800]))
    alpha, sigma = (v[:, None, None, None] for v in level[:2])
    denoised = (forward_diffusion(x0, noise, level) - sigma * predicted) / alpha
    loss = losses.denoising_loss(denoised, x0, weight=losses.snr_weight(level))
    expected = np.square(predicted - noise).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_minimiser_of_the_denoising_loss_is_the_posterior_mean():
    # x0 ~ N(m, s^2): among D(x_t) = a x_t + b the least squares are E[x0 | x_t], in closed form
    # a = alpha s^2 / (alpha^2 s^2 + sigma^2), b = m - a alpha m. The expectation over x0 and the
    # noise is exact by Gauss-Hermite quadrature, since the loss is a polynomial.
    mean, std = 0.7, 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()
    x0 = (mean + std * np.repeat(nodes, 8))[:, None].astype(np.float32)
    noise = np.tile(nodes, 8)[:, None].astype(np.float32)
    probability = np.outer(weights, weights).ravel().astype(np.float32)
    for alpha, sigma in ((1.0, 0.5), (0.3, 0.95)):
        level = NoiseLevel(*(jnp.full(64, v, jnp.float32) for v in (alpha, sigma, 0.0)))
        x_t = forward_diffusion(jnp.asarray(x0), jnp.asarray(noise), level)

        def loss(line, x_t=x_t, level=level):
            denoised = line[0] * x_t + line[1]
            each = losses.denoising_loss(denoised, x0, weight=losses.edm_weight(level))
            return jnp.sum(probability * each)

        # One Newton step from anywhere reaches the minimum of a quadratic.
        start = jnp.array([0.3, -0.2])
        minimum = start - jnp.linalg.solve(jax.hessian(loss)(start), jax.grad(loss)(start))
        slope = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        np.testing.assert_allclose(minimum, [slope, mean - slope * alpha * mean], atol=2e-5)


def test_regression_loss_is_l2_or_the_given_distance():
    rng = np.random.default_rng(3)
    x, y = jnp.asarray(rng.standard_normal((2, 3, 4, 4, 2)), jnp.float32)
    expected = np.square(np.asarray(x) - np.asarray(y)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.regression_loss(x, y), expected, rtol=1e-6)
    own = losses.regression_loss(x, y, distance=lambda x, y: jnp.abs(x - y).max(axis=(1, 2, 3)))
    np.testing.assert_allclose(own, np.abs(np.asarray(x - y)).max(axis=(1, 2, 3)), rtol=1e-6)


def test_wrong_shapes_and_names_are_refused():
    x, level = jnp.zeros((2, 4, 4, 1)), NoiseSchedule.edm().level(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="denoised_fake"):
        losses.distribution_matching_gradient(x, x, x[:1], level=level)
    with pytest.raises(ValueError, match="one of normalized"):
        losses.distribution_matching_gradient(x, x, x, level=level, weighting="snr")
    with pytest.raises(ValueError, match="gradient"):
        losses.distribution_matching_loss(x, x[..., 0])
    with pytest.raises(ValueError, match="x0"):
        losses.denoising_loss(x, x[0], weight=jnp.ones(2))
    with pytest.raises(ValueError, match="distance returned"):
        losses.regression_loss(x, x, distance=lambda x, y: jnp.zeros(()))
