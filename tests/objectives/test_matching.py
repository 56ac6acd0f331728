"""The two objectives against the equations written out in NumPy, and whose parameters they move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from once import once

from dmd_jax.method import losses
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.objectives import (
    Draws,
    draw,
    draw_lognormal,
    fake_score_loss,
    generator_loss,
    one_architecture,
)
from dmd_jax.objectives.matching import join_pairs, take_pairs

SCHEDULE = NoiseSchedule.edm()
NETWORKS = one_architecture(small.denoise, SCHEDULE)


@pytest.fixture(scope="module")
def setting():
    generator, teacher, fake = (small.init(jax.random.key(i)) for i in range(3))
    pairs = small.pairs_batch(0, 6)
    batch = {
        "z": jax.random.normal(jax.random.key(3), (6, *small.SHAPE)),
        "cond": jnp.arange(6) % small.CLASSES,
        "z_ref": pairs["z_ref"],
        "y_ref": pairs["y_ref"],
        "cond_ref": pairs["label"],
    }
    draws = draw(
        jax.random.key(4), (6, *small.SHAPE), schedule=SCHEDULE, min_index=20, max_index=980
    )
    return generator, teacher, fake, batch, draws


def test_generator_loss_is_the_papers(setting):
    generator, teacher, fake, batch, draws = setting

    def loss_fn(params):
        return generator_loss(
            params,
            draws,
            batch,
            networks=NETWORKS,
            teacher_params=teacher,
            fake_score_params=fake,
            regression_weight=0.25,
        )

    (loss, aux), grads = once(jax.value_and_grad(loss_fn, has_aux=True))(generator)
    level80 = SCHEDULE.generator_level(6)

    def generate(params, z, cond):
        return small.denoise(params, 80.0 * z, level80, cond)

    x, pullback = jax.vjp(lambda p: generate(p, batch["z"], batch["cond"]), generator)
    sigma = draws.level.sigma[:, None, None, None]
    x_t = x + sigma * draws.noise
    real = small.denoise(teacher, x_t, draws.level, batch["cond"])
    fake_x0 = small.denoise(fake, x_t, draws.level, batch["cond"])
    gradient = (fake_x0 - real) / jnp.abs(real - x).mean(axis=(1, 2, 3), keepdims=True)

    def regression(params):
        x_ref = generate(params, batch["z_ref"], batch["cond_ref"])
        return jnp.square(x_ref - batch["y_ref"]).mean()

    expected = 0.5 * jnp.square(gradient).mean() + 0.25 * regression(generator)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # Eq. 7: the parameters move by the gradient pulled back through G, and nothing else.
    matching = pullback(gradient / x.size)[0]
    wanted = jax.tree.map(lambda m, r: m + 0.25 * r, matching, jax.grad(regression)(generator))
    for found, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(aux["x"], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        aux["metrics"]["mean_abs_real_minus_x"], jnp.abs(real - x).mean(), rtol=1e-5
    )


def test_pairs_latents_among_z_are_in_both_losses(setting):
    """Algorithm 1 for Stable Diffusion: x is both G(z) and G(z_ref)."""
    generator, teacher, fake, batch, _ = setting
    shape = (12, *small.SHAPE)
    draws = draw(jax.random.key(5), shape, schedule=SCHEDULE, min_index=20, max_index=980)
    joined = {
        "z": join_pairs(batch["z"], batch["z_ref"]),
        "cond": join_pairs(batch["cond"], batch["cond_ref"]),
        "y_ref": batch["y_ref"],
    }

    def loss_fn(params, of, **options):
        return generator_loss(
            params,
            draws,
            of,
            networks=NETWORKS,
            teacher_params=teacher,
            fake_score_params=fake,
            **options,
        )

    @jax.jit
    def both(params):
        found = jax.value_and_grad(loss_fn, has_aux=True)(params, joined)
        matching = jax.value_and_grad(loss_fn, has_aux=True)(params, joined, regression_weight=0.0)
        regression = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, matching_weight=0.0)
        return found, matching, regression

    ((loss, aux), grads), ((first, _), first_grads), ((second, _), second_grads) = both(generator)
    np.testing.assert_allclose(loss, first + second, rtol=1e-5)
    for found, a, b in zip(*map(jax.tree.leaves, (grads, first_grads, second_grads))):
        np.testing.assert_allclose(found, a + b, atol=1e-5 * np.abs(a + b).max())
    assert aux["x"].shape == shape


def test_pairs_are_joined_in_groups_of_their_proportion():
    fresh, pairs = jnp.array([0, 1, 2, 3]), jnp.array([10, 11, 12, 13, 14, 15])
    joined = join_pairs(fresh, pairs)
    np.testing.assert_array_equal(joined, [0, 1, 10, 11, 12, 2, 3, 13, 14, 15])
    np.testing.assert_array_equal(take_pairs(joined, 6), pairs)
    np.testing.assert_array_equal(take_pairs(joined[:5], 3), pairs[:3])


def test_no_gradient_reaches_the_scores(setting):
    generator, teacher, fake, batch, draws = setting

    def loss_fn(teacher, fake):
        return generator_loss(
            generator,
            draws,
            batch,
            networks=NETWORKS,
            teacher_params=teacher,
            fake_score_params=fake,
        )[0]

    for grads in jax.grad(loss_fn, argnums=(0, 1))(teacher, fake):
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


def test_real_score_alone_pulls_to_the_teachers_prediction(setting):
    generator, teacher, fake, batch, draws = setting
    _, aux = generator_loss(
        generator,
        draws,
        batch,
        networks=NETWORKS,
        teacher_params=teacher,
        fake_score_params=fake,
        regression_weight=0.0,
        use_fake_score=False,
    )
    x, real = aux["pictures"]["x"], aux["pictures"]["denoised_real"]
    expected = (x - real) / jnp.abs(real - x).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(aux["pictures"]["gradient"], expected, rtol=1e-5)
    assert "loss_regression" not in aux["metrics"]


def test_regression_alone_asks_no_score(setting):
    generator, _, _, batch, draws = setting
    loss, aux = generator_loss(
        generator,
        draws,
        batch,
        networks=NETWORKS,
        teacher_params=None,
        fake_score_params=None,
        matching_weight=0.0,
        regression_weight=1.0,
    )
    assert float(loss) == float(aux["metrics"]["loss_regression"])


def test_fake_score_loss_is_the_papers_and_stops_at_the_samples(setting):
    _, _, fake, batch, draws = setting
    x0 = jnp.asarray(batch["y_ref"])
    loss = lambda x0: fake_score_loss(  # noqa: E731
        fake, draws, {"x0": x0, "cond": batch["cond"]}, denoise=small.denoise
    )
    sigma = np.asarray(draws.level.sigma)
    x_t = x0 + sigma[:, None, None, None] * draws.noise
    error = np.square(small.denoise(fake, x_t, draws.level, batch["cond"]) - x0)
    expected = ((1 / sigma**2 + 4.0) * error.mean(axis=(1, 2, 3))).mean()
    np.testing.assert_allclose(loss(x0), expected, rtol=1e-5)
    assert np.all(np.asarray(jax.grad(loss)(x0)) == 0)


def test_draws_cover_the_bins_both_ends_included():
    draws = jax.jit(
        lambda key: draw(key, (20000, 1), schedule=SCHEDULE, min_index=20, max_index=24)
    )(jax.random.key(0))
    found, counts = np.unique(np.asarray(draws.level.sigma), return_counts=True)
    np.testing.assert_array_equal(found, SCHEDULE.sigmas[20:25])
    # Each count is binomial(20000, 1/5): five standard deviations are 283.
    assert np.abs(counts - 4000).max() < 283
    whole = draw(jax.random.key(1), (20000, 1), schedule=SCHEDULE)
    assert float(whole.level.sigma.min()) == float(SCHEDULE.sigmas[0])
    assert float(whole.level.sigma.max()) == 80.0


def test_lognormal_draws_have_edms_moments():
    draws = draw_lognormal(jax.random.key(0), (20000, 2))
    log_sigma = np.log(np.asarray(draws.level.sigma))
    # Standard errors are 1.2/sqrt(20000) = 0.0085 and 0.006; five of each.
    assert abs(log_sigma.mean() + 1.2) < 0.0425
    assert abs(log_sigma.std() - 1.2) < 0.03
    assert abs(np.asarray(draws.noise).std() - 1) < 0.02


def test_a_denoiser_of_another_type_needs_no_flax(setting):
    """Any function of (params, x_t, level, cond) does, here with a tuple for params."""
    x = jnp.ones((2, 3))
    draws = Draws(SCHEDULE.level(jnp.array([100, 900])), jnp.zeros((2, 3)))
    denoise = lambda params, x_t, level, cond: params[0] * x_t  # noqa: E731
    loss = fake_score_loss((jnp.float32(0.5),), draws, {"x0": x, "cond": None}, denoise=denoise)
    expected = (0.25 * losses.edm_weight(draws.level)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
