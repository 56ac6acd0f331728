"""DMD2 and f-distill: a step written out by hand, its turns, its steps, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dmd_jax.distillation.from_config import abstract_state, shardings_of
from dmd_jax.errors import UserError
from dmd_jax.method import losses, samplers
from dmd_jax.method.randomness import Role, role_key
from dmd_jax.method.schedules import NoiseSchedule, few_step_indices, forward_diffusion
from dmd_jax.models.heads import Head
from dmd_jax.objectives import View, draw
from dmd_jax.objectives.dmd2 import DMD2, dmd2
from dmd_jax.objectives.f_distill import BINS, FDistill, f_distill
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.parallel import sharding
from dmd_jax.training.train_step import initial_state, jit_step, make_train_step

BATCH, SCHEDULE = 8, NoiseSchedule.edm()
SHAPE = (BATCH, *small.SHAPE)
FROZEN = {"network": small.init(jax.random.key(0))}


def images(k):
    rng = np.random.default_rng(k)
    return {
        "images": {
            "x0": np.tanh(rng.standard_normal(SHAPE)).astype(np.float32),
            "label": rng.integers(0, small.CLASSES, BATCH).astype(np.int32),
        }
    }


def objective(**settings):
    optimizer = adamw(AdamW(learning_rate=1e-3, warmup_steps=0))
    given = dict(batch_size=BATCH, generator_every=1, gan_weight=0.3, gan_fake_weight=0.7)
    kind, build = (FDistill, f_distill) if "divergence" in settings else (DMD2, dmd2)
    return small.build(build, kind(**given | settings), optimizer=optimizer)


def run(made, steps, mesh=None, accumulation=1):
    """(the state, the metrics of each step) after so many steps."""
    mesh = mesh or sharding.make_mesh(1, devices=jax.devices()[:1])
    initialize = functools.partial(initial_state, made, seed=7)
    frozen_shardings = sharding.infer_shardings(FROZEN, mesh)
    frozen = sharding.place(jax.device_get(FROZEN), frozen_shardings)
    shardings = shardings_of(abstract_state(initialize, mesh, frozen))
    state = jax.jit(initialize, out_shardings=shardings)(frozen)
    step = make_train_step(made, accumulation=accumulation, mesh=mesh)
    jitted, history = jit_step(step, mesh, shardings, frozen_shardings), []
    for k in range(steps):
        batch = {name: rows for name, rows in images(k).items() if name in made.needs}
        batch = sharding.to_mesh(batch, sharding.on_rows(batch, mesh))
        state, metrics = jitted(state, frozen, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def assert_same(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-3))


def key(step, role):
    return role_key(jax.random.key_data(jax.random.key(7)), step, role)


def logits(fake_score, x, role, cond):
    draws = draw(key(0, role), SHAPE, schedule=SCHEDULE)
    x_t = forward_diffusion(x, draws.noise, draws.level)
    features = small.features(fake_score["network"], x_t, draws.level, cond)
    return Head().apply({"params": fake_score["head"]}, features)


def drawn(step=0):
    """(z, labels) of a step."""
    z = jax.random.normal(key(step, Role.LATENTS), SHAPE)
    return z, jax.random.randint(key(step, Role.LABELS), (BATCH,), 0, small.CLASSES)


def test_a_step_is_the_one_written_out():
    made = objective()
    before = jax.jit(functools.partial(initial_state, made, seed=7))(FROZEN).players
    after, (metrics,) = run(made, 1)
    network, fake_score = FROZEN["network"], before["fake_score"].params
    assert fake_score["network"]["label"] is not None
    (z, cond), real = drawn(), images(0)["images"]

    def generator(params):
        x = samplers.one_step(small.denoise, params, z, cond, schedule=SCHEDULE)
        draws = draw(key(0, Role.MATCHING), SHAPE, schedule=SCHEDULE, min_index=20, max_index=980)
        x_t = forward_diffusion(jax.lax.stop_gradient(x), draws.noise, draws.level)
        scores = [
            small.denoise(p, x_t, draws.level, cond) for p in (network, fake_score["network"])
        ]
        gradient, _ = losses.distribution_matching_gradient(
            jax.lax.stop_gradient(x), *scores, level=draws.level
        )
        of_head = logits(fake_score, x, Role.GAN_GENERATOR, cond)
        matching = losses.distribution_matching_loss(x, gradient)
        return matching + 0.3 * losses.gan_generator_loss(of_head), x

    def fake(params, x):
        draws = draw(key(0, Role.FAKE_SCORE), SHAPE, schedule=SCHEDULE)
        x_t = forward_diffusion(x, draws.noise, draws.level)
        denoised = small.denoise(params["network"], x_t, draws.level, cond)
        denoising = losses.denoising_loss(denoised, x, weight=losses.edm_weight(draws.level)).mean()
        of_fake = logits(params, x, Role.GAN_FAKE, cond)
        of_real = logits(params, real["x0"], Role.GAN_REAL, real["label"])
        return denoising + 0.7 * losses.gan_head_loss(of_real, of_fake), (
            denoising,
            of_real,
            of_fake,
        )

    (loss, x), grads = jax.value_and_grad(generator, has_aux=True)(network)
    value, fake_grads = jax.value_and_grad(fake, has_aux=True)(fake_score, x)
    optimizer = adamw(AdamW(learning_rate=1e-3, warmup_steps=0)).transformation
    for name, params, gradients in (
        ("generator", network, grads),
        ("fake_score", fake_score, fake_grads),
    ):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        assert_same(after.players[name].params, jax.tree.map(jnp.add, params, updates), 1e-4)
    assert metrics["generator"]["loss_generator"] == pytest.approx(float(loss), rel=1e-5)
    _, (denoising, of_real, of_fake) = value
    fakes = metrics["fake_score"]
    assert fakes["loss_fake_score"] == pytest.approx(float(denoising), rel=1e-5)
    head_loss = float(losses.gan_head_loss(of_real, of_fake))
    assert fakes["loss_head"] == pytest.approx(head_loss, rel=1e-5)
    accuracy = (float((of_real > 0).mean()) + float((of_fake < 0).mean())) / 2
    assert fakes["head_accuracy"] == pytest.approx(accuracy)


def test_the_gan_reaches_the_encoder_and_the_head_and_not_the_decoder():
    """By Adam's first moment of the first step, a tenth of the gradient where none is clipped."""
    of = {w: run(objective(gan_fake_weight=w), 1)[0].players["fake_score"] for w in (1e-6, 1.0)}
    small_weight, large = (one.opt_state[1][0].mu for one in of.values())
    np.testing.assert_allclose(
        small_weight["network"]["second"]["kernel"], large["network"]["second"]["kernel"], rtol=1e-3
    )
    for name in ("first", "label"):
        changes = jax.tree.map(np.subtract, small_weight["network"][name], large["network"][name])
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(changes)) > 1e-4
    assert np.abs(large["head"]["logit"]["kernel"]).max() > 1e-4


def test_turns_of_two_time_scales_and_of_either_or():
    def moved(**settings):
        """By step, the players whose parameters the step changed."""
        made = objective(generator_every=3, **settings)
        states = [run(made, steps)[0].players for steps in range(1, 6)]
        states.insert(0, jax.jit(functools.partial(initial_state, made, seed=7))(FROZEN).players)

        def changed(name, k):
            pair = (states[k][name].params, states[k + 1][name].params)
            return any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, pair)))

        names = ("generator", "fake_score")
        return ["".join(name[0] for name in names if changed(name, k)) for k in range(5)]

    assert moved() == ["gf", "f", "f", "gf", "f"]
    assert moved(alternate=True) == ["g", "f", "f", "g", "f"]
    player = objective(generator_every=3, alternate=True).players["fake_score"]
    assert [int(player.updates_before(k)) for k in range(8)] == [0, 0, 1, 2, 2, 3, 4, 4]
    assert [bool(player.updates(k)) for k in range(5)] == [False, True, True, False, True]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_steps=4, generator_every=2),
        dict(num_steps=4, backward_simulation=False, ema_decay=0.9),
        dict(divergence="kl", ratio_normalization=True, ratio_rate=0.5),
    ],
    ids=["one", "four", "four-of-real", "f-distill"],
)
def test_eight_devices_equal_one(options):
    expected, history = run(objective(**options), 4)
    found, ours = run(objective(**options), 4, sharding.make_mesh(2, 4))
    assert_same(found.players, expected.players, 2e-5)
    for a, b in zip(ours, history):
        assert_same(a, b, 2e-5)


def test_micro_batches_change_nothing_but_the_mean_of_the_divergence():
    for options in (dict(), dict(num_steps=4)):
        assert_same(
            run(objective(**options), 3, accumulation=2)[0], run(objective(**options), 3)[0]
        )


def test_a_later_steps_input_is_the_samplers_to_the_bit():
    """By the same keys; and no gradient goes back through the steps before."""
    steps, key_ = 4, jax.random.key(3)
    z, cond = drawn()
    params = FROZEN["network"]
    indices = few_step_indices(1000, steps)
    assert indices == (999, 749, 499, 249)

    def noting(params, x_t, level, cond):
        seen.append((x_t, level.sigma))
        return small.denoise(params, x_t, level, cond)

    def simulated(params, step):
        return samplers.few_step_input(
            *(small.denoise, params, z, cond),
            schedule=SCHEDULE,
            num_steps=steps,
            step=step,
            noise=lambda step: jnp.take(noise, step - 1, axis=1),
        )

    noise = [samplers.few_step_noise(key_, SHAPE, step) for step in range(1, steps)]
    noise, seen = jnp.stack(noise, axis=1), []
    # An operation at a time: what one program is fused to may round otherwise than another.
    with jax.disable_jit():
        x0 = samplers.few_step(
            noting, params, z, cond, schedule=SCHEDULE, num_steps=steps, key=key_
        )
        found = [simulated(params, step) for step in range(steps)]
    assert len(seen) == steps
    for (ours, level), (x_t, sigma), index in zip(found, seen, indices):
        np.testing.assert_array_equal(ours, x_t)
        np.testing.assert_array_equal(level.sigma, sigma)
        np.testing.assert_array_equal(sigma, SCHEDULE.sigmas[jnp.full(BATCH, index)])
    by_hand = SCHEDULE.prior_scale * z
    for step, index in enumerate(indices):
        level = SCHEDULE.level(jnp.full(BATCH, index))
        if step:
            by_hand = forward_diffusion(by_hand, noise[:, step - 1], level)
        by_hand = small.denoise(params, by_hand, level, cond)
    np.testing.assert_allclose(x0, by_hand, atol=1e-5)

    gradient = jax.jit(jax.grad(lambda params, step: simulated(params, step)[0].sum()))(params, 3)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    # One step is the one-step generator.
    one = samplers.few_step(
        small.denoise, params, z, cond, schedule=SCHEDULE, num_steps=1, key=key_
    )
    expected = samplers.one_step(small.denoise, params, z, cond, schedule=SCHEDULE)
    np.testing.assert_array_equal(one, expected)


def test_one_k_for_the_whole_batch_and_another_from_step_to_step():
    made = objective(num_steps=4)
    drawn_steps = []
    for k in range(12):
        rows = made.rows(functools.partial(key, k), FROZEN, images(k))
        assert rows["step"].shape == () and rows["step_noise"].shape == (BATCH, 3, *small.SHAPE)
        drawn_steps.append(int(rows["step"]))
    assert set(drawn_steps) == {0, 1, 2, 3}


def test_without_backward_simulation_a_step_learns_on_noised_real_images():
    """The first one on pure noise as ever; the conditions are those of the real images."""
    made = objective(num_steps=4, backward_simulation=False, gan_weight=0.0, gan_fake_weight=0.0)
    assert made.needs.keys() == {"images"}
    real = images(0)["images"]
    rows = made.rows(functools.partial(key, 0), FROZEN, images(0))
    np.testing.assert_array_equal(rows["cond"], real["label"])
    for step, index in enumerate(few_step_indices(1000, 4)):
        level = SCHEDULE.level(jnp.full(BATCH, index))
        x_t = forward_diffusion(real["x0"], rows["step_noise"][:, 0], level)
        x_t = x_t if step else SCHEDULE.prior_scale * rows["z"]
        expected = small.denoise(FROZEN["network"], x_t, level, real["label"])
        loss = made.players["generator"].loss
        fake = {"network": FROZEN["network"]}
        view = View({"fake_score": fake}, FROZEN, rows | {"step": jnp.array(step)}, {})
        _, seen = loss(FROZEN["network"], view)
        np.testing.assert_allclose(seen.shared["x"], expected, atol=1e-5)


def test_running_means_of_the_ratio_are_in_the_state():
    options = dict(divergence="kl", ratio_normalization=True, ratio_rate=0.5, generator_every=2)
    made = objective(**options)
    start = jax.jit(functools.partial(initial_state, made, seed=7))(FROZEN)
    np.testing.assert_array_equal(start.players["generator"].carry, np.ones(BINS))
    assert start.players["fake_score"].carry == ()
    first, second, third = (run(made, steps)[0].players["generator"].carry for steps in (1, 2, 3))
    assert np.any(first != 1) and np.any(first != third)
    np.testing.assert_array_equal(first, second)  # the second step does not update the generator
    # By hand, from the head at the scores' own x_t.
    z, cond = drawn()
    x = samplers.one_step(small.denoise, FROZEN["network"], z, cond, schedule=SCHEDULE)
    draws = draw(key(0, Role.MATCHING), SHAPE, schedule=SCHEDULE, min_index=20, max_index=980)
    x_t = forward_diffusion(x, draws.noise, draws.level)
    features = small.features(FROZEN["network"], x_t, draws.level, cond)
    head = start.players["fake_score"].params["head"]
    ratio = losses.density_ratio(Head().apply({"params": head}, features))
    expected = np.ones(BINS)
    bins = np.minimum((10 * (draws.level.sigma - 0.002) / 79.998).astype(int), BINS - 1)
    for index in set(bins.tolist()):
        expected[index] = 0.5 + 0.5 * float(np.mean(ratio[bins == index]))
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    # Without normalisation there is no carry.
    plain = run(objective(divergence="kl"), 1)[0].players["generator"]
    assert plain.carry == ()


def test_reverse_kl_is_dmd2_but_for_the_levels_of_the_gan():
    options = dict(gan_weight=0.0, gan_fake_weight=0.5)
    plain, _ = run(objective(**options), 2)
    weighted, _ = run(objective(divergence="rkl", **options), 2)
    assert_same(weighted.players, plain.players, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_steps=3), "3 steps of a generator; expected a number of at least 1 that divides"),
        (dict(min_index=500, max_index=20), "min_index=500 and max_index=20"),
        (dict(gan_max_index=1000), "gan_max_index=1000; expected less than 1000"),
        (dict(matching_weight=0.0, gan_weight=0.0), "matching_weight and gan_weight are 0"),
        (dict(gan_fake_weight=0.0), "gan_fake_weight is 0; expected more"),
        (dict(alternate=True), "expected generator_every of at least 2"),
        (dict(divergence="kl", ratio_lower=2.0, ratio_upper=1.0), "expected ratio_lower < ratio_u"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        objective(**settings)


def test_a_network_without_features_has_no_head():
    family = small.teacher()._replace(features=None)
    with pytest.raises(UserError, match="has no features for a head; expected gan_weight and"):
        small.build(dmd2, DMD2(batch_size=BATCH), family=family)
    made = small.build(
        dmd2, DMD2(batch_size=BATCH, gan_weight=0.0, gan_fake_weight=0.0), family=family
    )
    assert made.needs == {}
    assert initial_state(made, FROZEN, seed=0).players["fake_score"].params.keys() == {"network"}
