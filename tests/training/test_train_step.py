"""The one step: Algorithm 1's order, its options, and the same numbers on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dmd_jax.distillation.from_config import abstract_state, shardings_of
from dmd_jax.method.randomness import Role, role_key
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.objectives import draw, fake_score_loss, generator_loss, one_architecture
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.parallel import sharding
from dmd_jax.training.state import apply_gradients, train_state, update_ema
from dmd_jax.training.train_step import initial_state, jit_step, make_train_step

SCHEDULE = NoiseSchedule.edm()
NETWORKS = one_architecture(small.denoise, SCHEDULE)
BATCH = 16


def make_step(*, mesh=None, accumulation=1, **options):
    """(the objective, its step)."""
    objective = small.objective(**dict(ema_decay=0.9, batch_size=BATCH) | options)
    return objective, make_train_step(objective, accumulation=accumulation, mesh=mesh)


def pairs_of(k, size=BATCH):
    return {"pairs": small.pairs_batch(k, size)}


def flat(metrics):
    """All players' metrics in one dict."""
    return {name: value for found in metrics.values() for name, value in found.items()}


def start(objective, step, mesh):
    """What a run starts with on a mesh: the frozen parameters, the state, and the jitted step."""
    initialize = functools.partial(initial_state, objective, seed=7)
    frozen = {"network": small.init(jax.random.key(0))}
    frozen_shardings = sharding.infer_shardings(frozen, mesh)
    frozen = sharding.place(jax.device_get(frozen), frozen_shardings)
    shardings = shardings_of(abstract_state(initialize, mesh, frozen))
    state = jax.jit(initialize, out_shardings=shardings)(frozen)
    return frozen, state, jit_step(step, mesh, shardings, frozen_shardings)


def run(made, mesh, steps, batch=pairs_of):
    """The state, the metrics of each step, and the jitted step, after `steps` on a mesh."""
    frozen, state, jitted = start(*made, mesh)
    history = []
    for k in range(steps):
        rows = batch(k)
        rows = sharding.to_mesh(rows, sharding.on_rows(rows, mesh))
        state, metrics = jitted(state, frozen, rows)
        history.append(flat(jax.device_get(metrics)))
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
    generator, fake_score = state.players["generator"], state.players["fake_score"]
    trees = {
        "generator": generator.params,
        "fake_score": fake_score.params,
        "ema": generator.ema,
        "generator's mu": generator.opt_state[1][0].mu,
        "generator's nu": generator.opt_state[1][0].nu,
        "fake_score's nu": fake_score.opt_state[1][0].nu,
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
        objective, step = make_step(mesh=mesh, batch_size=64 * BATCH)
        frozen = jax.eval_shape(lambda key: {"network": small.init(key)}, jax.random.key(0))
        frozen_shardings = sharding.infer_shardings(frozen, mesh)
        initialize = functools.partial(initial_state, objective, seed=7)
        state = abstract_state(initialize, mesh, frozen)
        batch = objective.needs["pairs"].arrays
        jitted = jit_step(step, mesh, shardings_of(state), frozen_shardings)
        compiled = jitted.lower(state, frozen, {"pairs": batch}).compile()
        return compiled.cost_analysis()["flops"]

    one = operations(sharding.make_mesh(1, devices=jax.devices()[:1]))
    # The optimiser's operations on whole parameters are not split by data; they are few beside
    # those on 1,024 rows.
    assert operations(sharding.make_mesh(8)) < one / 5
    assert operations(sharding.make_mesh(2, 4)) < one / 5


def test_the_state_is_donated():
    mesh = sharding.make_mesh(2, 4)
    frozen, state, jitted = start(*make_step(), mesh)
    batch = pairs_of(0)
    jitted(state, frozen, sharding.to_mesh(batch, sharding.on_rows(batch, mesh)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_fake_score_trains_on_the_generator_before_its_update():
    """One step written out by hand from Algorithm 1, with the draws of (seed, step, role)."""
    teacher = small.init(jax.random.key(0))
    generator = jax.tree.map(lambda leaf: 1.1 * leaf, teacher)
    optimizer = adamw(AdamW(learning_rate=1e-2, warmup_steps=0))
    transformation = optimizer.transformation
    names = ("generator", "fake_score")
    state = train_state(
        {"generator": generator, "fake_score": teacher},
        dict.fromkeys(names, transformation),
        averaged=["generator"],
        seed=3,
    )
    pairs = small.pairs_batch(1, BATCH)
    _, step = make_step(optimizer=optimizer)
    after, metrics = jax.jit(step)(state, {"network": teacher}, {"pairs": pairs})

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
        expected_generator = apply_gradients(state.players["generator"], grads, transformation)
        expected_fake = apply_gradients(state.players["fake_score"], fake_grads, transformation)
        return expected_generator, expected_fake, aux

    expected_generator, expected_fake, aux = jax.device_get(by_hand())
    # Adam's first update is g / |g|, so a rounding near zero would show in full: the moments are
    # compared instead of the parameters.
    assert_same(moments(after.players["generator"]), moments(expected_generator))
    assert_same(moments(after.players["fake_score"]), moments(expected_fake))
    loss = metrics["generator"]["loss_matching"]
    np.testing.assert_allclose(loss, aux["metrics"]["loss_matching"], rtol=1e-5)
    trained = after.players["generator"]
    expected_ema = update_ema(generator, trained.params, jnp.int32(0), 0.9)
    assert_same(trained.ema, jax.device_get(expected_ema))
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
        fresh = {"label": small.pairs_batch(100 + k, pairs)["label"]}
        return pairs_of(k, pairs) | {"prompts": fresh}

    options = dict(
        batch_size=2 * pairs,
        regression_batch_size=pairs,
        match_reference=True,
        family=small.teacher()._replace(draw_tokens=None),
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
    rows, teacher = batch(0)["pairs"], small.init(jax.random.key(0))
    x_ref = NETWORKS.generate(teacher, rows["z_ref"], rows["label"])
    expected = np.mean((np.asarray(x_ref) - rows["y_ref"]) ** 2)
    np.testing.assert_allclose(history[0]["loss_regression"], expected, rtol=1e-5)


def test_generator_updates_on_each_second_step():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    states = []
    for steps in (1, 2, 3):
        state, history, _ = run(make_step(generator_every=2), mesh, steps)
        states.append((jax.device_get(state), history))
    players = [state.players for state, _ in states]
    generators, fakes = ([each[name] for each in players] for name in ("generator", "fake_score"))
    for a, b in zip(jax.tree.leaves(generators[0]), jax.tree.leaves(generators[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(fakes[1].params["label"] != fakes[0].params["label"])
    second = states[1][1][1]
    assert second["loss_generator"] == 0 and second["loss_fake_score"] > 0
    assert np.any(generators[2].params["label"] != generators[1].params["label"])
    assert int(generators[2].opt_state[1][0].count) == 2


def test_every_step_draws_anew_and_a_seed_repeats():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    same = lambda k: pairs_of(0)  # noqa: E731
    _, first, _ = run(make_step(), mesh, 3, batch=same)
    _, second, _ = run(make_step(), mesh, 3, batch=same)
    assert [m["loss_fake_score"] for m in first] == [m["loss_fake_score"] for m in second]
    assert len({float(m["loss_fake_score"]) for m in first}) == 3


@pytest.mark.parametrize(
    "variant, options",
    [
        ("plain", {}),
        ("every_fifth", {"generator_every": 5}),
        ("four_parts", {"accumulation": 4}),
        ("another_weighting", {"weighting": "sigma_over_alpha", "regression_weight": 1.0}),
    ],
)
def test_twelve_steps_are_those_of_the_step_written_for_two_networks(golden, variant, options):
    """The arrays were made by the step that knew a generator and a fake score and nothing else.

    By JAX 0.10.2: another one's compiler rounds otherwise, to 1.5e-6 with 0.12.0.
    """
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    state, history, _ = run(make_step(mesh=mesh, **options), mesh, 12)
    players = jax.device_get(state.players)
    trees = {
        "generator": players["generator"].params,
        "fake_score": players["fake_score"].params,
        "ema": players["generator"].ema,
        "generator_mu": moments(players["generator"]),
        "fake_score_nu": players["fake_score"].opt_state[1][0].nu,
    }
    found = {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for name in history[0]:
        found[f"metrics/{name}"] = np.array([metrics[name] for metrics in history])
    found["metrics/learning_rate"] = found.pop("metrics/learning_rate_generator")
    arrays = golden("steps_of_two_networks")
    expected = {
        name.removeprefix(f"{variant}/"): array
        for name, array in arrays.items()
        if name.startswith(f"{variant}/")
    }
    assert found.keys() - expected.keys() == {"metrics/learning_rate_fake_score"}
    every = options.get("generator_every", 1)
    for name, array in expected.items():
        ours, array = found[name], np.asarray(array)
        if name == "metrics/learning_rate":  # told of the steps that update the generator
            ours, array = ours[::every], array[::every]
        scale = np.abs(array).max()
        tolerance = (1e-6 if jax.__version__ == "0.10.2" else 5e-6) * scale
        np.testing.assert_allclose(ours, array, rtol=0, atol=tolerance, err_msg=name)
