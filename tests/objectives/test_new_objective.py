"""An objective and a teacher that the package does not know, through its ordinary machinery."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY

from dmd_jax.commands.train import train
from dmd_jax.config import load_config
from dmd_jax.distillation.program import program_of
from dmd_jax.distillation.setting import Method, Setting
from dmd_jax.method import samplers
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import NoiseSchedule, expand
from dmd_jax.objectives.objective import Objective, Player, Seen, need
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.parallel.sharding import MIN_SHARDED_SIZE, make_mesh
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.teachers.teacher import Teacher

SHAPE, WIDTH = (4, 4, 1), 64


# A family of teachers: a function in Haiku's style, with flat names of modules, and a condition
# that is a dict of two tokens.
def haiku_init(key):
    keys = jax.random.split(key, 2)
    return {
        "net/~/in": {"w": 0.1 * jax.random.normal(keys[0], (18, WIDTH)), "b": jnp.zeros(WIDTH)},
        "net/~/out": {"w": 0.1 * jax.random.normal(keys[1], (WIDTH, 16)), "b": jnp.zeros(16)},
    }


def haiku_denoise(params, x_t, level, cond):
    scale = jnp.sqrt(expand(level.sigma, x_t) ** 2 + 0.25)
    told = jnp.stack([level.time, jnp.cos(cond["angle"]) * cond["size"]], axis=1)
    hidden = jnp.concatenate([(x_t / scale).reshape(len(x_t), -1), told], axis=1)
    hidden = jnp.tanh(hidden @ params["net/~/in"]["w"] + params["net/~/in"]["b"])
    raw = hidden @ params["net/~/out"]["w"] + params["net/~/out"]["b"]
    return 0.25 / scale**2 * x_t + 0.5 * raw.reshape(x_t.shape)


def haiku_teacher():
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def draw_tokens(key, count):
        angle, size = jax.random.uniform(key, (2, count), jnp.float32)
        return {"angle": 6 * angle, "size": size}

    return Teacher(
        denoise=haiku_denoise,
        schedule=NoiseSchedule.edm(),
        sample_shape=SHAPE,
        tokens={"angle": scalar, "size": scalar},
        encode=lambda frozen, tokens: {name: tokens[name] for name in ("angle", "size")},
        null=lambda frozen: {"angle": jnp.zeros(1), "size": jnp.zeros(1)},
        decode=lambda frozen, x0: x0,
        draw_tokens=draw_tokens,
    )


# An objective: a vector that learns the teacher's mean picture, and a generator that is drawn to
# what the vector's update of the same step has left of it, on each third step.
def pull(teacher, batch_size):
    generate = functools.partial(samplers.one_step, teacher.denoise, schedule=teacher.schedule)
    optimizer = adamw(AdamW(learning_rate=1e-2, warmup_steps=0))

    def rows(keys, frozen, batch):
        z = jax.random.normal(keys(Role.LATENTS), (batch_size, *SHAPE), jnp.float32)
        tokens = teacher.draw_tokens(keys(Role.LABELS), batch_size)
        return {"z": z, "cond": teacher.encode(frozen, tokens), "real": batch["images"]["x0"]}

    def mean_loss(params, view):
        x = generate(view.players["generator"], view.rows["z"], view.rows["cond"])
        off = view.rows["real"] - params["mean"]
        seen = Seen({"loss_mean": jnp.mean(off**2)}, {"away": jax.lax.stop_gradient(x + off)})
        return seen.metrics["loss_mean"], seen

    def generator_loss(params, view):
        x = generate(params, view.rows["z"], view.rows["cond"])
        loss = jnp.mean((x - view.shared["away"]) ** 2) + jnp.mean(
            view.players["mean"]["mean"] ** 2
        )
        return loss, Seen({"loss_pull": loss})

    def pictures(players, frozen, batch, count):
        z = jnp.ones((count, *SHAPE))
        cond = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count,)), teacher.null(frozen))
        return {"samples": generate(players["generator"], z, cond)}

    image = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    return Objective(
        players={
            "mean": Player(lambda frozen, key: {"mean": jnp.zeros(SHAPE)}, mean_loss, optimizer),
            "generator": Player(
                lambda frozen, key: frozen["network"], generator_loss, optimizer, 3, 0.9
            ),
        },
        kept="generator",
        batch_size=batch_size,
        needs={"images": need(batch_size, {"x0": image})},
        rows=rows,
        pictures=pictures,
    )


class Images:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"x0": np.random.default_rng(index).standard_normal(SHAPE).astype(np.float32)}


def setting(batch_size=8):
    objective = pull(haiku_teacher(), batch_size)
    frozen = jax.device_get({"network": haiku_init(jax.random.key(1))})
    return Setting(
        method=Method(lambda stage: objective, lambda: jax.eval_shape(lambda: frozen), None),
        frozen=frozen,
        starts={},
        sources=lambda stage: {"images": Images()},
        identity={"made": "here"},
        network={"name": "haiku"},
        class_names=None,
        description="{step} steps",
        preview={},
        preview_count=4,
    )


def run(workdir, steps, mesh, config):
    config.steps, config.log_every, config.checkpoint_every, config.picture_every = steps, 1, 3, 4
    train("train", workdir, config, setting(), [(steps, config)], mesh=mesh, profile=range(0))
    step, state, _ = Checkpoints(workdir / "checkpoints").restore(
        program_of(config, setting().method, mesh, setting().frozen).state
    )
    assert step == steps
    return jax.device_get(state)


@pytest.fixture
def config():
    return load_config(str(TINY), [])


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        scale = max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def test_it_trains_resumes_and_shards_over_eight_devices(config, tmp_path):
    one = make_mesh(1, devices=jax.devices()[:1])
    whole = run(tmp_path / "whole", 8, one, config)
    for steps in (5, 8):
        stopped = run(tmp_path / "stopped", steps, one, config)
    assert_same(stopped, whole, 0)
    mesh = make_mesh(2, 4)
    assert_same(run(tmp_path / "mesh", 8, mesh, config), whole, 1e-5)
    # The generator updates on steps 1, 4 and 7, the vector on all.
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "loss_pull" in line] == [1, 4, 7]
    assert [line["step"] for line in lines if "loss_mean" in line] == list(range(1, 9))
    counts = {name: int(one.opt_state[1][0].count) for name, one in whole.players.items()}
    assert counts == {"mean": 8, "generator": 3}
    assert (tmp_path / "mesh" / "pictures" / "samples-0000008.png").exists()
    assert (tmp_path / "mesh" / "weights" / "model.safetensors").exists()


def test_its_first_step_is_the_one_written_out(config, tmp_path):
    """The vector's gradient by hand, and what the generator sees after the vector's update."""
    state = run(tmp_path, 1, make_mesh(1, devices=jax.devices()[:1]), config)
    mean = state.players["mean"].params["mean"]
    # Adam's first update is the learning rate times the gradient's sign; -1e-2 of decay times 0.
    moment = state.players["mean"].opt_state[1][0].mu["mean"] / 0.1
    np.testing.assert_allclose(mean, -1e-2 * np.sign(moment), rtol=1e-4)
    line = read_metrics(tmp_path)[0]
    x = line["loss_pull"] - np.mean(mean**2)
    real = np.sqrt(line["loss_mean"])
    # The generator is (x - (x + real - 0))^2 from its target, whose mean is that of real^2.
    np.testing.assert_allclose(x, real**2, rtol=1e-5)


def test_it_compiles_for_a_mesh_with_its_state_split(config):
    mesh = make_mesh(2, 4)
    found = setting()
    program = program_of(config, found.method, mesh, found.method.frozen())
    compiled = program.step(config).lower(*program.arguments(config)).compile()
    assert compiled.cost_analysis()["flops"] > 0
    for leaf in jax.tree.leaves(program.state.players["generator"].params):
        split = leaf.size >= MIN_SHARDED_SIZE
        assert (leaf.sharding.shard_shape(leaf.shape) != leaf.shape) == split, leaf.shape
