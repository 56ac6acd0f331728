"""The commands from end to end on a tiny network: what they write, and that it can be used."""

import json
import re

import jax
import numpy as np
from commands import TINY, succeeds
from PIL import Image

from dmd_jax.data.pair_shards import PairSource
from dmd_jax.method import samplers
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import build_denoiser
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.weights import load_weights, params_sha256


def folder_of(tiny, name):
    return next(
        arg.partition("=")[2] for arg in map(str, tiny) if arg.startswith(f"--config.{name}=")
    )


def test_pairs_are_the_teachers_samples_of_their_noise(tiny):
    teacher = load_weights(folder_of(tiny, "teacher.weights"))
    pairs = PairSource(folder_of(tiny, "data.pairs"), sample_shape=(8, 8, 1), num_classes=10)
    assert len(pairs) == 80
    assert pairs.metadata.teacher_sha256 == params_sha256(teacher.params)
    records = [pairs[index] for index in (0, 31, 32, 79)]
    z, y, label = (np.stack([r[name] for r in records]) for name in ("z_ref", "y_ref", "label"))
    denoise = build_denoiser(teacher.network).denoise
    expected = jax.jit(lambda p, z: samplers.heun(denoise, p, z, label, num_steps=2))(
        teacher.params, z
    )
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    assert len({float(pairs[index]["z_ref"][0, 0, 0]) for index in range(80)}) == 80
    assert {int(pairs[index]["label"]) for index in range(80)} == set(range(10))


def test_train_leaves_metrics_events_pictures_checkpoints_and_weights(trained):
    lines = read_metrics(trained)
    assert [line["step"] for line in lines] == [4, 8, 12]
    names = {
        "loss_generator",
        "loss_matching",
        "loss_regression",
        "loss_fake_score",
        "grad_norm_generator",
        "grad_norm_fake_score",
        "dm_gradient_norm",
        "dm_nonfinite",
        "mean_abs_real_minus_x",
        "learning_rate_generator",
        "learning_rate_fake_score",
        "images_per_second",
    }
    for line in lines:
        assert line.keys() == names | {"step"}
        assert all(np.isfinite(list(line.values())))
    # The mean of steps 1 to 4 of a two-step warm-up from zero to 1e-3.
    np.testing.assert_allclose(
        lines[0]["learning_rate_generator"], (0 + 0.5e-3 + 1e-3 + 1e-3) / 4, rtol=1e-6
    )
    with Image.open(trained / "pictures" / "preview-0000012.png") as picture:
        assert picture.width > 10 * 32 and picture.height > 7 * 32
    assert sorted(int(p.name) for p in (trained / "checkpoints").iterdir()) == [4, 8, 12]
    (events,) = (trained / "tensorboard").iterdir()
    assert b"loss_matching" in events.read_bytes()


def test_a_run_begins_with_the_table_of_its_parameters(tiny, tmp_path, capsys):
    succeeds("train", *tiny, "--workdir", tmp_path, "--config.steps=1", "--config.mesh.fsdp=4")
    said = capsys.readouterr().err
    params = load_weights(tmp_path).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert "train: the parameters of the generator" in said
    assert f"Total: {count:,} -- {4 * count:,} bytes" in said
    assert re.search(r"float32 \| [0-9,]+ +\| .*'fsdp'", said)


def test_sample_makes_the_generators_images(trained, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "z.npy", rng.standard_normal((5, 8, 8, 1)).astype(np.float32))
    for weights in (trained, trained / "weights"):
        succeeds(
            "sample",
            "--weights",
            weights,
            "--latents",
            tmp_path / "z.npy",
            "--labels",
            "3,1",
            "--out",
            tmp_path / "x.npy",
        )
        images = np.load(tmp_path / "x.npy")
        assert images.dtype == np.float32 and images.shape == (5, 8, 8, 1)
        found = load_weights(weights)
        denoise = build_denoiser(found.network).denoise
        expected = jax.jit(
            lambda p, z, d=denoise: samplers.one_step(
                d, p, z, np.array([3, 1, 3, 1, 3]), schedule=NoiseSchedule.edm()
            )
        )(found.params, np.load(tmp_path / "z.npy"))
        np.testing.assert_allclose(images, expected, atol=1e-5 * np.abs(expected).max())


def test_sample_writes_a_grid_and_repeats_by_seed(trained, tmp_path):
    common = ("sample", "--weights", trained, "--num", "6", "--seed", "4")
    for sampler, steps in (("one-step", ()), ("heun", ("--steps", 2)), ("euler", ("--steps", 2))):
        out = [tmp_path / f"{sampler}-{i}.npy" for i in range(2)]
        for path in out:
            succeeds(*common, "--sampler", sampler, *steps, "--out", path)
        np.testing.assert_array_equal(*map(np.load, out))
    succeeds(*common, "--sampler", "heun", "--steps", "2", "--s-churn", "1", "--out", out[0])
    succeeds(*common, "--sampler", "heun", "--steps", "2", "--out", out[1])
    assert np.abs(np.load(out[0]) - np.load(out[1])).max() > 1e-3
    succeeds(*common, "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "L" and picture.width > 3 * 32


def test_workdir_alone_goes_on_and_a_finished_run_is_left_as_it_is(trained, capsys):
    before = load_weights(trained)
    succeeds("train", "--workdir", trained)
    assert "going on from step 12" in capsys.readouterr().err
    assert params_sha256(load_weights(trained).params) == params_sha256(before.params)
    assert before.description.endswith("at step 12, players/generator/ema")


def test_names_of_classes_go_from_folders_to_weights_and_results(tmp_path, capsys):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for index, name in enumerate(names):
        (tmp_path / "real" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * index).save(tmp_path / "real" / name / "0.jpg")
    in_order = sorted(names)
    run = ("teacher", "--config", TINY, "--workdir", tmp_path / "run")
    succeeds(*run, f"--config.data.images={tmp_path / 'real'}")
    expected = ", ".join(f"{label} {name}" for label, name in enumerate(in_order))
    assert f"teacher: classes by label: {expected}\n" in capsys.readouterr().out
    for folder in (tmp_path / "run" / "weights", tmp_path / "run"):
        assert load_weights(folder).class_names == tuple(in_order)
    succeeds(
        *("evaluate", "--weights", tmp_path / "run", "--sampler", "heun", "--steps", 1),
        *("--reference", tmp_path / "real", "--num", 16, "--batch-size", 16),
        *("--precision-recall", 0, "--out", tmp_path / "results.json"),
    )
    assert json.loads((tmp_path / "results.json").read_text())["class_names"] == in_order


def test_teacher_learns(tmp_path):
    """Fifty steps bring the loss down from where an untrained network starts."""
    workdir = tmp_path / "teacher"
    succeeds(
        "teacher",
        "--config",
        TINY,
        "--workdir",
        workdir,
        "--config.teaching.steps=50",
        "--config.log_every=10",
        "--config.checkpoint_every=50",
    )
    losses = [line["loss_denoising"] for line in read_metrics(workdir)]
    assert losses[-1] < 0.75 * losses[0]
