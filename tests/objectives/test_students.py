"""Consistency, progressive distillation and reflow: their steps written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dmd_jax.errors import UserError
from dmd_jax.method import consistency as method
from dmd_jax.method import losses
from dmd_jax.method.randomness import Role, role_key
from dmd_jax.method.schedules import NoiseSchedule, edm_level, forward_diffusion
from dmd_jax.objectives.consistency import Consistency, consistency
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.objectives.progressive import Progressive, progressive
from dmd_jax.objectives.reflow import Reflow, reflow
from dmd_jax.training.train_step import initial_state, make_train_step

BATCH = 8
SHAPE = (BATCH, *small.SHAPE)
OPTIMIZER = adamw(AdamW(learning_rate=1e-2, warmup_steps=0))
FROZEN = {"network": small.init(jax.random.key(0))}


def images(k):
    rng = np.random.default_rng(k)
    x0 = np.tanh(rng.standard_normal(SHAPE)).astype(np.float32)
    return x0, rng.integers(0, small.CLASSES, BATCH).astype(np.int32)


def keys(step):
    return jax.random.split(role_key(jax.random.key_data(jax.random.key(7)), step, Role.LEVELS))


def build(kind, settings):
    return small.build(kind, settings, optimizer=OPTIMIZER)


def run(made, steps, batch):
    """The states and the metrics after each step."""
    state = jax.jit(functools.partial(initial_state, made, seed=7))(FROZEN)
    step, found = jax.jit(make_train_step(made)), []
    for k in range(steps):
        state, metrics = step(state, FROZEN, batch(k))
        found.append((state.players["generator"], metrics["generator"]))
    return found


def image_batch(k):
    x0, label = images(k)
    return {"images": {"x0": x0, "label": label}}


@pytest.mark.parametrize("source", ["distillation", "training"])
def test_consistency_descends_to_an_average_of_itself_at_the_next_level(source):
    settings = Consistency(batch_size=BATCH, source=source, distance="l1", target_decay=0.6)
    made = build(consistency, settings)
    assert made.needs.keys() == {"images"} and list(made.players) == ["generator"]
    function = method.consistency_function(small.denoise)
    params = target = FROZEN["network"]
    for k, (player, metrics) in enumerate(run(made, 3, image_batch)):
        # The average follows each update of the optimiser.
        target = jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, target, params)
        index_key, noise_key = keys(k)
        index = jax.random.randint(index_key, (BATCH,), 0, 17)
        x0, cond = images(k)
        level, end = method.karras_level(index / 17), method.karras_level((index + 1) / 17)
        x_t = forward_diffusion(x0, jax.random.normal(noise_key, SHAPE), level)
        if source == "training":
            nearer = method.euler_step(x_t, x0, level, end)
        else:
            network = FROZEN["network"]
            nearer = method.heun_step(small.denoise, network, x_t, level, end, cond)
        apart = function(params, x_t, level, cond) - function(target, nearer, end, cond)
        expected = float(jnp.abs(apart).mean())
        assert metrics["loss_generator"] == pytest.approx(expected, rel=2e-4)
        for a, b in zip(*map(jax.tree.leaves, (player.carry, target)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        params = player.params


def test_the_boundary_is_the_image_itself():
    function = method.consistency_function(small.denoise)
    x_t = jnp.asarray(images(0)[0])
    level = edm_level(jnp.full(BATCH, 0.002))
    found = function(FROZEN["network"], x_t, level, jnp.zeros(BATCH, int))
    np.testing.assert_allclose(found, x_t, atol=1e-6)


def test_progressive_halves_its_steps_and_takes_its_student_for_the_teacher():
    made = build(progressive, Progressive(batch_size=BATCH, first_steps=4, halve_every=2))
    found = run(made, 7, image_batch)
    assert [float(metrics["student_steps"]) for _, metrics in found] == [4, 4, 2, 2, 1, 1, 1]
    students = [FROZEN["network"], *(player.params for player, _ in found)]
    # The student at the beginning of each stage; the last stage does not end.
    for (player, _), begun in zip(found, (0, 0, 2, 2, 4, 4, 4), strict=True):
        for a, b in zip(*map(jax.tree.leaves, (player.carry["teacher"], students[begun]))):
            np.testing.assert_array_equal(a, b)
    # The loss of the third step, by hand: two steps.
    part_key, noise_key = keys(2)
    index = jnp.floor(2 * jax.random.uniform(part_key, (BATCH,)))
    (x0, cond), levels = images(2), [method.karras_level((index + by) / 2) for by in (0, 0.5, 1)]
    x_t = forward_diffusion(x0, jax.random.normal(noise_key, SHAPE), levels[0])
    target = method.two_step_target(small.denoise, students[2], x_t, *levels, cond)
    weight = losses.truncated_snr_weight(levels[0])
    denoised = small.denoise(students[2], x_t, levels[0], cond)
    expected = losses.denoising_loss(denoised, target, weight=weight).mean()
    assert found[2][1]["loss_generator"] == pytest.approx(float(expected), rel=2e-4)


def test_reflow_regresses_on_the_velocity_of_straight_paths():
    made = build(reflow, Reflow(batch_size=BATCH))
    pairs = small.pairs_batch(0, BATCH)
    ((_, metrics),) = run(made, 1, lambda k: {"pairs": pairs})
    key = role_key(jax.random.key_data(jax.random.key(7)), 0, Role.LEVELS)
    low, high = 0.002 / 1.002, 80 / 81
    t = jax.random.uniform(key, (BATCH,), minval=low, maxval=high)[:, None, None, None]
    z, y = pairs["z_ref"], pairs["y_ref"]
    x_t = (1 - t) * y + t * z
    x0 = small.denoise(
        FROZEN["network"], x_t / (1 - t), edm_level((t / (1 - t)).ravel()), pairs["label"]
    )
    velocity = (x_t - x0) / t
    expected = float(jnp.square(velocity - (z - y)).mean())
    assert metrics["loss_generator"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (consistency, Consistency(batch_size=BATCH), "no lpips is given; expected one, or l1 or"),
        (progressive, Progressive(batch_size=BATCH, first_steps=6), "expected a power of two"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        build(kind, settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (consistency, Consistency(batch_size=BATCH, distance="l2")),
        (progressive, Progressive(batch_size=BATCH)),
        (reflow, Reflow(batch_size=BATCH)),
    ],
)
def test_teachers_that_are_not_edms_are_refused(kind, settings):
    family = small.teacher(NoiseSchedule.scaled_linear())._replace(sigma_data=None)
    with pytest.raises(UserError, match="is for EDM's networks; expected a teacher of them"):
        small.build(kind, settings, family=family)
