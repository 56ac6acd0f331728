"""The one step: Algorithm 1's order, its options, and the same numbers on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dmd_jax import sharding
from dmd_jax.experiment import abstract_state, shardings_of
from dmd_jax.objective import draw, fake_score_loss, generator_loss, one_architecture
from dmd_jax.schedules import NoiseSchedule
from dmd_jax.state import Role, adamw, apply_gradients, role_key, train_state, update_ema, warmup
from dmd_jax.train_step import jit_step, make_train_step

SCHEDULE = NoiseSchedule.edm()
NETWORKS = one_architecture(small.denoise, SCHEDULE)
OPTIMIZER = adamw(learning_rate=1e-3, warmup_steps=4)
BATCH = 16


def make_step(**options):
    options = dict(ema_decay=0.9, batch_size=BATCH) | options
    return make_train_step(
        NETWORKS,
        schedule=SCHEDULE,
        optimizer=OPTIMIZER,
        fake_optimizer=OPTIMIZER,
        learning_rate=warmup(1e-3, 4),
        sample_shape=small.SHAPE,
        num_classes=small.CLASSES,
        **options,
    )


def initialize(params):
    return train_state(
        params, params, optimizer=OPTIMIZER, fake_optimizer=OPTIMIZER, use_ema=True, seed=7
    )


def run(step, mesh, steps, batch=lambda k: small.pairs_batch(k, BATCH)):
    """The state, the metrics of each step, and the jitted step, after `steps` on a mesh."""
    teacher = small.init(jax.random.key(0))
    teacher_shardings = sharding.infer_shardings(teacher, mesh)
    teacher = sharding.place(jax.device_get(teacher), teacher_shardings)
    shardings = shardings_of(abstract_state(initialize, mesh, teacher))
    state = jax.jit(initialize, out_shardings=shardings)(teacher)
    jitted = jit_step(step, mesh, shardings, teacher_shardings)
    history = []
    for k in range(steps):
        rows = batch(k)
        rows = sharding.to_mesh(rows, sharding.on_rows(rows, mesh))
        state, metrics = jitted(state, teacher, None, rows)
        history.append(jax.device_get(metrics))
    return state, history, jitted


@pytest.fixture(scope="module")
def one_device():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    state, history, _ = run(make_step(), mesh, 10)
    return jax.device_get(state), history


def assert_same(found, expected, tolerance=1e-5):
    found, expected = jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-3))


def moments(model):
    return model.opt_state[1][0].mu


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)], ids=["data", "fsdp", "mixed"])
def test_ten_steps_on_eight_devices_equal_one_device(one_device, shape):
    expected, history = one_device
    mesh = sharding.make_mesh(*shape)
    state, found, jitted = run(make_step(mesh=mesh), mesh, 10)
    for ours, theirs in zip(found, history):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    # Adam's moments and the parameters after ten updates.
    assert_same(state, expected)
    assert jitted._cache_size() == 1
    trees = {
        "generator": state.generator.params,
        "fake_score": state.fake_score.params,
        "ema": state.ema,
        "generator's mu": state.generator.opt_state[1][0].mu,
        "generator's nu": state.generator.opt_state[1][0].nu,
        "fake_score's nu": state.fake_score.opt_state[1][0].nu,
    }
    for name, tree in trees.items():
        large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size >= sharding.MIN_SHARDED_SIZE]
        assert large, name
        for leaf in large:
            for shard in leaf.addressable_shards:
                assert shard.data.nbytes * shape[1] == leaf.nbytes, name


def test_each_device_works_on_its_own_rows_alone():
    """A data-parallel step does an eighth of the operations on each of eight devices."""

    def operations(mesh):
        step = make_step(mesh=mesh, batch_size=64 * BATCH)
        teacher = jax.eval_shape(small.init, jax.random.key(0))
        teacher_shardings = sharding.infer_shardings(teacher, mesh)
        state = abstract_state(initialize, mesh, teacher)
        batch = jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct((64 * len(rows), *rows.shape[1:]), rows.dtype),
            small.pairs_batch(0, BATCH),
        )
        jitted = jit_step(step, mesh, shardings_of(state), teacher_shardings)
        return jitted.lower(state, teacher, None, batch).compile().cost_analysis()["flops"]

    one = operations(sharding.make_mesh(1, devices=jax.devices()[:1]))
    # The optimiser's operations on whole parameters are not split by data; they are few beside
    # those on 1,024 rows.
    assert operations(sharding.make_mesh(8)) < one / 5
    assert operations(sharding.make_mesh(2, 4)) < one / 5


def test_the_state_is_donated():
    mesh = sharding.make_mesh(2, 4)
    teacher = small.init(jax.random.key(0))
    teacher_shardings = sharding.infer_shardings(teacher, mesh)
    teacher = sharding.place(jax.device_get(teacher), teacher_shardings)
    shardings = shardings_of(abstract_state(initialize, mesh, teacher))
    state = jax.jit(initialize, out_shardings=shardings)(teacher)
    jitted = jit_step(make_step(), mesh, shardings, teacher_shardings)
    batch = small.pairs_batch(0, BATCH)
    jitted(state, teacher, None, sharding.to_mesh(batch, sharding.on_rows(batch, mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher))


def test_fake_score_trains_on_the_generator_before_its_update():
    """One step written out by hand from Algorithm 1, with the draws of (seed, step, role)."""
    teacher = small.init(jax.random.key(0))
    generator = jax.tree.map(lambda leaf: 1.1 * leaf, teacher)
    optimizer = adamw(learning_rate=1e-2, warmup_steps=0)
    state = train_state(
        generator, teacher, optimizer=optimizer, fake_optimizer=optimizer, use_ema=True, seed=3
    )
    pairs = small.pairs_batch(1, BATCH)
    step = make_train_step(
        NETWORKS,
        schedule=SCHEDULE,
        optimizer=optimizer,
        fake_optimizer=optimizer,
        learning_rate=warmup(1e-2, 0),
        batch_size=BATCH,
        sample_shape=small.SHAPE,
        num_classes=small.CLASSES,
        ema_decay=0.9,
    )
    after, metrics = jax.jit(step)(state, teacher, None, pairs)

    def keyed(role):
        return role_key(state.key, 0, role)

    shape = (BATCH, *small.SHAPE)
    cond = jax.random.randint(keyed(Role.LABELS), (BATCH,), 0, small.CLASSES)
    batch = {
        "z": jax.random.normal(keyed(Role.LATENTS), shape),
        "cond": cond,
        "z_ref": pairs["z_ref"],
        "y_ref": pairs["y_ref"],
        "cond_ref": pairs["label"],
    }
    matching = draw(keyed(Role.MATCHING), shape, schedule=SCHEDULE, min_index=20, max_index=980)

    @jax.jit
    def by_hand():
        grads, aux = jax.grad(generator_loss, has_aux=True)(
            generator,
            matching,
            batch,
            networks=NETWORKS,
            teacher_params=teacher,
            fake_score_params=teacher,
        )
        fake_grads = jax.grad(fake_score_loss)(
            teacher,
            draw(keyed(Role.FAKE_SCORE), shape, schedule=SCHEDULE),
            {"x0": aux["x"], "cond": cond},
            denoise=small.denoise,
        )
        expected_generator = apply_gradients(state.generator, grads, optimizer)
        expected_fake = apply_gradients(state.fake_score, fake_grads, optimizer)
        return expected_generator, expected_fake, aux

    expected_generator, expected_fake, aux = jax.device_get(by_hand())
    # Adam's first update is g / |g|, so a rounding near zero would show in full: the moments are
    # compared instead of the parameters.
    assert_same(moments(after.generator), moments(expected_generator))
    assert_same(moments(after.fake_score), moments(expected_fake))
    np.testing.assert_allclose(metrics["loss_matching"], aux["metrics"]["loss_matching"], rtol=1e-5)
    expected_ema = update_ema(generator, after.generator.params, jnp.int32(0), 0.9)
    assert_same(after.ema, jax.device_get(expected_ema))
    assert int(after.step) == 1


def test_accumulation_changes_nothing(one_device):
    mesh = sharding.make_mesh(2, devices=jax.devices()[:2])
    _, found, _ = run(make_step(accumulation=4, mesh=mesh), mesh, 3)
    _, history = one_device
    for ours, theirs in zip(found, history):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


def test_reference_latents_in_the_matching_loss_on_any_mesh_in_any_parts():
    """Stable Diffusion's form of the step, with conditions that come with the batch.

    Each micro-batch has a sample for each of eight devices, and four pairs.
    """
    pairs = 12

    def batch(k):
        rows = small.pairs_batch(k, pairs)
        return rows | {"fresh_label": small.pairs_batch(100 + k, pairs)["label"]}

    options = dict(
        batch_size=2 * pairs,
        match_reference=True,
        condition=lambda teacher_params, batch: (batch["fresh_label"], batch["label"]),
    )
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    state, history, _ = run(make_step(**options), mesh, 3, batch)
    mesh = sharding.make_mesh(2, 4)
    found, parts, _ = run(make_step(mesh=mesh, accumulation=3, **options), mesh, 3, batch)
    for ours, theirs in zip(parts, history):
        for name in theirs:
            # The gradient is the difference of two scores that hardly differ yet.
            rtol = 5e-5 if name in ("dm_gradient_norm", "loss_matching", "loss_generator") else 1e-5
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, err_msg=name)
    assert_same(found, jax.device_get(state))

    # The first step's regression by hand: the pairs' samples against their images.
    rows, teacher = batch(0), small.init(jax.random.key(0))
    x_ref = NETWORKS.generate(teacher, rows["z_ref"], rows["label"])
    expected = np.mean((np.asarray(x_ref) - rows["y_ref"]) ** 2)
    np.testing.assert_allclose(history[0]["loss_regression"], expected, rtol=1e-5)


def test_generator_updates_on_each_second_step():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    states = []
    for steps in (1, 2, 3):
        state, history, _ = run(make_step(generator_every=2), mesh, steps)
        states.append((jax.device_get(state), history))
    (first, _), (second, history), (third, _) = states
    for a, b in zip(jax.tree.leaves(first.generator), jax.tree.leaves(second.generator)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.ema["label"], second.ema["label"])
    assert np.any(second.fake_score.params["label"] != first.fake_score.params["label"])
    assert history[1]["loss_generator"] == 0 and history[1]["loss_fake_score"] > 0
    assert np.any(third.generator.params["label"] != second.generator.params["label"])
    assert int(third.generator.opt_state[1][0].count) == 2


def test_every_step_draws_anew_and_a_seed_repeats():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    same = lambda k: small.pairs_batch(0, BATCH)  # noqa: E731
    _, first, _ = run(make_step(), mesh, 3, batch=same)
    _, second, _ = run(make_step(), mesh, 3, batch=same)
    assert [m["loss_fake_score"] for m in first] == [m["loss_fake_score"] for m in second]
    assert len({float(m["loss_fake_score"]) for m in first}) == 3
