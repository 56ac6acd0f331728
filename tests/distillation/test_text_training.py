"""Stable Diffusion's road with small random weights: configs/sd15_tiny.py, folder to samples."""

import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails, finish, start, succeeds
from ml_collections import ConfigDict
from PIL import Image
from shard_labels import write_changed

from dmd_jax.config import load_config, shipped_config
from dmd_jax.data.pair_shards import PairSource
from dmd_jax.data.pairs_metadata import read_metadata
from dmd_jax.distillation import roles_of, setting_of
from dmd_jax.distillation.from_config import fake_weight_of, teacher_of
from dmd_jax.distillation.setting import data_of
from dmd_jax.method.losses import snr_weight
from dmd_jax.method.schedules import NoiseLevel
from dmd_jax.models import build_denoiser
from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.weights import load_weights
from dmd_jax.teachers.edm import edm_teacher

PROMPTS = ("a red ball", "a green ball", "a cat on a mat", "A house by the sea, oil painting")


@pytest.fixture(scope="module")
def road(text_weights, lpips_file, tmp_path_factory):
    """The road up to the pairs: what `train` takes, and the prompts' file."""
    folder = tmp_path_factory.mktemp("road")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    succeeds("prompts", prompts, folder / "prompts")
    arguments = [
        *("--config", shipped_config("sd15_tiny")),
        f"--config.teacher.weights={text_weights}",
        f"--config.data.prompts={folder / 'prompts'}",
        f"--config.lpips.weights={lpips_file}",
        "--config.lpips.resolution=32",  # 224 takes VGG seconds a step
    ]
    succeeds("pairs", *arguments, "--workdir", folder / "pairs")
    return [*arguments, f"--config.data.pairs={folder / 'pairs'}"], prompts


def test_dmd2_in_four_steps_to_a_sampled_image(road, tmp_path, capsys):
    """Without a GAN: of encoded images there is no source yet, which is said."""
    arguments, prompts = road
    dmd2 = ("--config", f"{arguments[1]}:dmd2", *arguments[2:4])
    gan = ("--config.objective.gan_weight=1e-3", "--config.objective.gan_fake_weight=1e-2")
    line = fails(capsys, "train", *dmd2, *gan, "--workdir", tmp_path / "gan")
    assert "dmd2 reads real images with these settings, and of text there is no source" in line
    run = tmp_path / "run"
    succeeds("train", *dmd2, "--workdir", run, "--config.steps=2")
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert load_weights(run / "weights").generator == {"num_steps": 4}
    out = tmp_path / "four.npy"
    succeeds("sample", "--weights", run, "--prompts", prompts, "--batch-size", 4, "--out", out)
    assert np.load(out).shape == (len(PROMPTS), 64, 64, 3)


def parameters(workdir):
    return jax.tree.leaves(load_weights(workdir / "weights").params)


def test_ten_steps_killed_and_resumed_to_a_sampled_grid(road, tmp_path):
    arguments, prompts = road
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("train", *arguments, "--workdir", whole))
    # With more steps to go it cannot end before it is killed.
    process = start("train", *arguments, "--workdir", killed, "--config.steps=200")
    deadline = time.monotonic() + 250
    while not (killed / "checkpoints" / "5").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = finish(start("train", *arguments, "--workdir", killed))
    assert "going on from step 5" in resumed or "going on from step 10" in resumed
    for found, expected in zip(parameters(killed), parameters(whole)):
        np.testing.assert_array_equal(found, expected)
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(line["dm_nonfinite"] == 0 and line["loss_regression"] > 0 for line in lines)
    # Seven rows of ten pairs' 64x64 images with a border.
    assert Image.open(whole / "pictures" / "preview-0000010.png").size == (662, 464)

    grid = tmp_path / "samples.png"
    succeeds("sample", "--weights", whole, "--prompts", prompts, "--out", grid)
    assert Image.open(grid).size == (134, 134)


@pytest.fixture(scope="module")
def setting(road):
    path, *overrides = road[0][1:]
    config = load_config(str(path), [*overrides, "--config.objective.distance=l2"])
    return config, setting_of(config, teacher_of(config))


def batch_of(config, found):
    return next(data_of(found, make_mesh(2, 4), config, []))


def conditions(config, found, frozen, batch):
    """What the step makes of the tokens of fresh latents and of pairs."""
    keys = lambda role: jax.random.key(int(role))  # noqa: E731
    stage = ConfigDict(config.to_dict() | {"batch_size": 4})
    stage.objective.match_reference = False
    rows = found.method.objective(stage).rows(keys, frozen, batch)
    return rows["cond"], rows["cond_ref"]


def test_the_batches_hold_pairs_and_as_many_fresh_prompts_as_are_missing(setting):
    config, found = setting
    batch = batch_of(config, found)
    shapes = jax.tree.map(lambda leaf: leaf.shape, found.method.batch(config))
    assert jax.tree.map(np.shape, batch) == shapes
    assert len(batch["prompts"]["tokens"]) == 4 and len(batch["pairs"]["tokens"]) == 4
    config.objective.match_reference = False
    assert len(batch_of(config, found)["prompts"]["tokens"]) == 8
    config.objective.match_reference = True


def test_text_encoded_ahead_is_the_condition_of_the_step(setting):
    config, in_step = setting
    batch = batch_of(config, in_step)
    other = ConfigDict(config.to_dict())
    other.teacher.encode = "ahead"
    ahead = setting_of(other, teacher_of(other))
    expected = conditions(config, in_step, in_step.frozen, batch)
    frozen, before = ahead.method.split(ahead.frozen)
    assert "text_encoder" not in frozen and list(before) == ["text_encoder"]
    encoded = ahead.method.ahead(before, batch)
    assert encoded["pairs"].keys() == {"z_ref", "y_ref", "cond"}
    assert encoded["prompts"].keys() == {"cond"}
    found = conditions(other, ahead, frozen, encoded)
    cond_shape = build_denoiser(config.network.to_dict()).cond_shape
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (4, *cond_shape)
        np.testing.assert_array_equal(ours, theirs)
    assert "text_encoder" in in_step.method.split(in_step.method.frozen())[0]


def test_only_the_teacher_is_guided(setting):
    """Guidance 3 on the noise, by the empty prompt: written out on raw denoisers."""
    config, found = setting
    denoiser, frozen = build_denoiser(config.network.to_dict()), found.frozen
    teacher = edm_teacher(denoiser)._replace(null=lambda frozen: frozen["null"])
    networks, schedule = roles_of(config, teacher), denoiser.schedule
    fresh, _ = conditions(config, found, frozen, batch_of(config, found))
    x_t = jax.random.normal(jax.random.key(0), (4, *denoiser.sample_shape))
    level = schedule.level(jnp.array([20, 300, 700, 980]))
    with_text = denoiser.denoise(frozen["network"], x_t, level, fresh)
    uncond = jnp.broadcast_to(frozen["null"], fresh.shape)
    without = denoiser.denoise(frozen["network"], x_t, level, uncond)
    guided = networks.teacher(frozen, x_t, level, fresh)
    expected = without + 3.0 * (with_text - without)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(guided, expected, rtol=0, atol=1e-5 * scale)
    assert np.abs(guided - with_text).max() > 1e-3 * scale
    plain = networks.fake_score(frozen["network"], x_t, level, fresh)
    np.testing.assert_array_equal(plain, with_text)
    # The generator is the network at t = 999 on z itself, without guidance.
    last = NoiseLevel(*(jnp.full(4, values[-1]) for values in schedule_fields(schedule)))
    expected = denoiser.denoise(frozen["network"], x_t, last, fresh)
    np.testing.assert_array_equal(networks.generate(frozen["network"], x_t, fresh), expected)
    assert float(last.time[0]) == 999


def schedule_fields(schedule):
    return schedule.alphas, schedule.sigmas, schedule.times


def test_the_fake_score_learns_the_noise(setting):
    assert fake_weight_of(setting[0]) is snr_weight


@pytest.mark.parametrize(
    "override, named",
    [
        ("teacher.guidance=7.5", "were made with guidance 3.0; expected 7.5"),
        ("data.prompts=", "config.data.prompts is empty; expected the folder of `dmd-jax prompts`"),
        (
            "teacher.encode=never",
            "config.teacher.encode is 'never'; expected one of in_step",
        ),
        ("teacher.decoder=none", "config.teacher.decoder is 'none'; expected one of"),
        ("objective.regression_batch_size=8", "config.batch_size is 8; expected more than"),
        ("remat=some", "remat is 'some'; expected one of none, full, dots"),
        ("network.cross_attention_dim=32", "another architecture than config.network"),
    ],
)
def test_what_does_not_fit_is_refused(road, tmp_path, capsys, override, named):
    arguments = [*road[0], f"--config.{override}"]
    if "regression_batch_size" not in override:
        # Eight devices take batches of eight.
        arguments += ["--config.batch_size=16", "--config.objective.regression_batch_size=8"]
    assert named in fails(capsys, "train", *arguments, "--workdir", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_pairs_of_another_text_encoder_are_refused(road, tmp_path, capsys):
    arguments, _ = road
    folder = arguments[-1].partition("=")[2]
    changes = {"text_encoder_sha256": "0" * 64}
    write_changed(folder, read_metadata(folder), tmp_path / "pairs", **changes)
    line = fails(
        capsys,
        *("train", *arguments[:-1], f"--config.data.pairs={tmp_path / 'pairs'}"),
        *("--config.batch_size=16", "--config.objective.regression_batch_size=8"),
        *("--workdir", tmp_path / "run"),
    )
    assert "were made with text_encoder_sha256 000" in line
    assert len(PairSource(folder, sample_shape=(8, 8, 4), num_classes=0, token_length=77)) == 16


def test_what_a_resumed_run_must_share(road, setting, tmp_path):
    """Other prompts of the same number make another run."""
    found = setting[1]
    prompts = tmp_path / "other.txt"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    succeeds("prompts", prompts, tmp_path / "prompts")
    path, *overrides = road[0][1:]
    overrides += ["--config.objective.distance=l2", f"--config.data.prompts={tmp_path / 'prompts'}"]
    other = load_config(str(path), overrides)
    identity = setting_of(other, teacher_of(other)).identity
    assert identity.keys() == found.identity.keys()
    different = {key for key in identity if identity[key] != found.identity[key]}
    assert different == {"prompts_sha256"}
    assert identity["pairs_sampler"] == "pndm" and len(identity["pairs_prompts_sha256"]) == 64


def test_a_teacher_is_not_trained_here(tmp_path, capsys):
    line = fails(
        capsys,
        *("teacher", "--config", shipped_config("sd15_tiny"), "--workdir", tmp_path / "teacher"),
        *("--config.data.images=digits", "--config.teaching.batch_size=8"),
    )
    assert "config.network is unet2d_condition; expected a network of EDM's" in line
