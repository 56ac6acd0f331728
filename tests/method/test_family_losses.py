"""The losses of DMD's family against arrays of their authors' code, and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.method import losses
from dmd_jax.method.schedules import edm_level, forward_diffusion

# Divergences by the names of f_distill.npz, and f'' of each f(r) up to a factor.
CURVATURES = {
    "rkl": lambda r: 1 / r**2,
    "kl": lambda r: 1 / r,
    "js": lambda r: 1 / (r * (1 + r)),
    "sf": lambda r: 1 / (r**2 * (1 + r)),
    "sh": lambda r: r**-1.5,
    "jf": lambda r: 1 / r + 1 / r**2,
    "neyman": lambda r: 1 / r**3,
}


def check(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture
def f_distill(golden):
    arrays = golden("f_distill")
    return {k: v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for k, v in arrays.items()}


def bins_of(arrays):
    """The bin of each sample's level: equal parts of the schedule's range of sigma."""
    low, high, count = (arrays[name].item() for name in ("min_t", "max_t", "bin_num"))
    return np.clip(((arrays["t"] - low) / (high - low) * count).astype(int), 0, count - 1)


@pytest.mark.parametrize("rate", [None, 0.0, 0.9])
def test_each_divergences_weight_loss_and_gradient(f_distill, rate):
    part = "plain" if rate is None else f"norm{rate}"
    clip = {"lower": f_distill["ratio_lower"].item(), "upper": f_distill["ratio_upper"].item()}
    names = sorted({key.split("/")[0] for key in f_distill if key.endswith(f"/{part}/h")})
    assert names == ["jf", "js", "kl", "neyman", "sf", "sh"]
    x, level = jnp.asarray(f_distill["x"]), edm_level(f_distill["t"])

    @jax.jit
    def run(x, logits):
        typical = None
        after = jnp.ones(f_distill["bin_num"].item())
        if rate is not None:
            bins = bins_of(f_distill)
            ratio = losses.density_ratio(logits, **clip)
            after = losses.ratio_means(after, ratio, bins, rate=rate)
            typical = after[bins]
        scores = f_distill["denoised_real"], f_distill["denoised_fake"]
        gradient, _ = losses.distribution_matching_gradient(x, *scores, level=level, epsilon=1e-6)
        found = {}
        for name in names:
            weight = losses.divergence_weight(logits, divergence=name, typical=typical, **clip)
            weighted = weight[:, None, None, None] * gradient
            value = jax.value_and_grad(losses.distribution_matching_loss)(x, weighted)
            found[name] = weight, *value
        return found, after

    found, after = run(x, f_distill["logits"])
    for name in names:
        expected = {key: f_distill[f"{name}/{part}/{key}"] for key in ("h", "loss", "dloss_dx")}
        for value, reference in zip(found[name], expected.values()):
            check(value, reference, 1e-5)
        if rate is not None:
            check(after, f_distill[f"{name}/{part}/bins_after"], 1e-6)


def test_reverse_kl_is_the_matching_loss_itself(f_distill):
    weight = losses.divergence_weight(f_distill["logits"], divergence="rkl")
    np.testing.assert_array_equal(weight, np.ones(16, np.float32))
    x = jnp.asarray(f_distill["x"])
    gradient, _ = losses.distribution_matching_gradient(
        *(x, f_distill["denoised_real"], f_distill["denoised_fake"]),
        level=edm_level(f_distill["t"]),
        epsilon=1e-6,
    )
    loss, derivative = jax.value_and_grad(losses.distribution_matching_loss)(x, gradient)
    check(loss, f_distill["rkl_loss"], 1e-5)
    check(derivative, f_distill["rkl_dloss_dx"], 1e-5)


@pytest.mark.parametrize("name", CURVATURES)
def test_a_divergences_weight_is_r_squared_times_its_curvature(name):
    ratio = np.geomspace(0.12, 19, 9)
    weight = losses.divergence_weight(np.log(ratio), divergence=name)
    expected = ratio**2 * CURVATURES[name](ratio)
    np.testing.assert_allclose(weight, expected / expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["rkl", "kl", "js", "hellinger", "jeffreys"])
def test_weighted_gradient_is_the_divergences_derivative_on_gaussians(divergence):
    """Fake N(m, s^2), real N(0, 1): dD_f/dm and dD_f/ds by quadrature, against h's expectation."""
    generator = {  # f with f(1) = 0, and the factor between r^2 f'' and h
        "rkl": (lambda r: -np.log(r), 1.0),
        "kl": (lambda r: r * np.log(r), 1.0),
        "js": (lambda r: r * np.log(r) - (1 + r) * np.log((1 + r) / 2), 1.0),
        "hellinger": (lambda r: (1 - np.sqrt(r)) ** 2, 0.5),
        "jeffreys": (lambda r: (r - 1) * np.log(r), 1.0),
    }
    f, factor = generator[divergence]
    z, dz = np.linspace(-12, 12, 48_001, retstep=True)
    normal = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    def ratio_at(x, m, s):
        return np.exp(-(x**2) / 2 + ((x - m) / s) ** 2 / 2) * s

    def value(m, s):
        return (normal * f(ratio_at(m + s * z, m, s))).sum() * dz

    m, s, step = 0.3, 0.9, 1e-4
    x = m + s * z
    ratio = ratio_at(x, m, s)
    score_difference = -(x - m) / s**2 + x  # grad log fake - grad log real
    h = np.asarray(losses.DIVERGENCES[divergence](jnp.asarray(ratio)), np.float64)
    for by, dx in (((step, 0), np.ones_like(z)), ((0, step), z)):
        derivative = (value(m + by[0], s + by[1]) - value(m - by[0], s - by[1])) / (2 * step)
        weighted = (normal * factor * h * score_difference * dx).sum() * dz
        assert weighted == pytest.approx(derivative, rel=1e-5)


def test_an_unknown_divergence_and_two_logits_are_refused():
    with pytest.raises(ValueError, match="expected one of rkl, kl, js, softened_rkl, hellinger"):
        losses.divergence_weight(np.zeros(2), divergence="chi")
    with pytest.raises(ValueError, match=r"logits have shape \(2, 2\); expected one for each"):
        losses.density_ratio(np.zeros((2, 2)))


def test_ratios_are_clipped_and_bins_without_a_sample_keep_their_mean():
    ratio = losses.density_ratio(np.array([-1e9, -2.0, 0.0, 3.0, np.inf]))
    np.testing.assert_allclose(ratio, [0.1, np.exp(-2.0), 1.0, 20.0, 20.0], rtol=1e-6)
    means = losses.ratio_means(
        jnp.array([1.0, 1.0, 3.0]), ratio, np.array([0, 0, 0, 1, 1]), rate=0.5
    )
    first = 0.5 + 0.5 * float(ratio[:3].mean())
    np.testing.assert_allclose(means, [first, 10.5, 3.0], rtol=1e-6)


def test_gan_losses(f_distill):
    found = losses.gan_generator_loss(f_distill["fake_logits"])
    check(found, f_distill["gan_generator_loss"], 1e-6)
    found = losses.gan_head_loss(f_distill["real_logits"], f_distill["fake_logits"])
    check(found, f_distill["gan_discriminator_loss"], 1e-6)
    # Logits of any size stay finite, and so do their gradients.
    large = jnp.array([-1e4, 1e4])
    assert losses.gan_head_loss(large, large) == 1e4
    np.testing.assert_allclose(jax.grad(losses.gan_generator_loss)(large), [-0.5, 0.0])
    # At its minimum a logit is the log ratio of the densities: 3 real for 1 fake.
    at = jnp.log(3.0)
    slope = jax.grad(lambda t: losses.gan_head_loss(jnp.full(3, t), jnp.full(1, t)))
    mixed = jax.grad(lambda t: 0.75 * jax.nn.softplus(-t) + 0.25 * jax.nn.softplus(t))
    assert abs(mixed(at)) < 1e-6 and slope(0.0) == 0.0


def test_sid_loss_by_hand_and_its_constant_denominator():
    x, real, fake = (jnp.array([[v]], jnp.float32) for v in (1.0, 3.0, 2.5))
    # (3 - 2.5) ((3 - 1) - a (3 - 2.5)) / |1 - 3|
    assert losses.sid_loss(x, real, fake, a=1.2)[0] == pytest.approx(0.5 * 1.4 / 2)
    slope = jax.grad(lambda x: losses.sid_loss(x, real, fake, a=1.2)[0])(x)
    assert slope[0, 0] == pytest.approx(-0.5 / 2)
    assert losses.sid_loss(x, x, fake, a=0.0)[0] == 0  # and not a division by zero


def test_the_second_term_of_sid_is_zero_with_the_exact_fake_score():
    """E[(f_fake - f_real)(f_fake - x)] = 0: f_fake is the mean of x given x_t, whatever f_real."""
    rng = np.random.default_rng(0)
    spread, sigma, count = 0.7, 1.3, 400_000
    x, noise = rng.standard_normal((2, count, 1))
    x = (0.4 + spread * x).astype(np.float32)
    x_t = forward_diffusion(x, noise.astype(np.float32), edm_level(np.full(count, sigma)))
    fake = (spread**2 * x_t + sigma**2 * 0.4) / (spread**2 + sigma**2)
    terms = np.asarray((fake - jnp.tanh(x_t)) * (fake - x), np.float64)
    assert abs(terms.mean()) < 4 * terms.std() / np.sqrt(count)
    # And not for another fake score.
    terms = np.asarray((fake - jnp.tanh(x_t)) * (2.0 * fake - x), np.float64)
    assert abs(terms.mean()) > 10 * terms.std() / np.sqrt(count)


def test_consistency_loss_metrics_and_refusals():
    x, y, weight = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]), jnp.array([2.0])
    assert losses.consistency_loss(x, y, weight=weight)[0] == 2 * 2.5
    assert losses.consistency_loss(x, y, weight=weight, distance="l1")[0] == 2 * 1.5
    own = losses.consistency_loss(x, y, weight=weight, distance=lambda x, y: (x - y).max(axis=1))
    assert own[0] == 4
    assert not jax.grad(lambda y: losses.consistency_loss(x, y, weight=weight)[0])(y).any()
    with pytest.raises(ValueError, match="distance is 'l3'; expected one of l1, l2, or a function"):
        losses.consistency_loss(x, y, weight=weight, distance="l3")
    level = edm_level(jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(losses.uniform_weight(level), [1, 1])
    np.testing.assert_array_equal(losses.truncated_snr_weight(level), [4, 1])
