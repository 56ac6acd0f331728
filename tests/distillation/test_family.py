"""The objectives beside DMD through the commands: train, resume, start, sample, and refusals."""

import json

import numpy as np
import pytest
from commands import ROOT, TINY, fails, succeeds
from PIL import Image

from dmd_jax.config import load_config
from dmd_jax.distillation import setting_of
from dmd_jax.distillation.from_config import teacher_of
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.checkpoints import restore_subtree
from dmd_jax.storage.weights import load_weights, params_sha256
from dmd_jax.training.train_step import initial_state

FAMILY = ROOT / "tests" / "configs" / "family.py"
BINS = ("f_distill", "--config.objective.ratio_normalization=True")
BINS += ("--config.objective.ratio_rate=0.9",)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(name, *overrides) -> the workdir of twelve steps, made once."""
    made = {}

    def workdir(*options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("family")
            succeeds("train", *arguments(tiny, *options), "--workdir", made[options])
        return made[options]

    return workdir


def arguments(tiny, name, *options):
    return ["--config", f"{FAMILY}:{name}", tiny[2], *options]


def test_reflow_trains_on_pairs_and_reads_none_of_the_images(tiny, tmp_path, capsys):
    options = ("--config.data.images=", "--config.steps=4")
    line = fails(capsys, "train", *arguments(tiny, "reflow", *options), "--workdir", tmp_path)
    assert "config.data.pairs is empty" in line
    succeeds("train", *arguments(tiny, "reflow", *options), tiny[3], "--workdir", tmp_path)
    assert read_metrics(tmp_path)[-1]["loss_generator"] > 0


def test_consistency_trains_on_images_and_reads_no_pairs(tiny, tmp_path):
    options = ("--config.data.pairs=", "--config.steps=4")
    succeeds("train", *arguments(tiny, "consistency", *options), "--workdir", tmp_path)
    assert read_metrics(tmp_path)[-1]["loss_generator"] > 0


def sha256(workdir):
    return params_sha256(load_weights(workdir / "weights").params)


@pytest.mark.parametrize(
    "options",
    [("dmd2",), BINS, ("progressive",)],
    ids=lambda options: options[0],
)
def test_a_stopped_run_goes_on_to_the_same_bits(run, tiny, tmp_path, options):
    expected = run(*options)
    succeeds("train", *arguments(tiny, *options), "--workdir", tmp_path, "--config.steps=5")
    succeeds("train", "--workdir", tmp_path, "--config.steps=12")
    assert sha256(tmp_path) == sha256(expected)
    last = [read_metrics(workdir)[-1] for workdir in (tmp_path, expected)]
    for line in last:
        del line["images_per_second"]
    assert last[0] == last[1]


def test_a_run_with_a_head_and_bins_goes_on_on_another_mesh(run, tiny, tmp_path):
    begun = arguments(tiny, *BINS)
    succeeds("train", *begun, "--workdir", tmp_path, "--config.steps=6")
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    succeeds("train", "--workdir", tmp_path, "--config.steps=12", *mesh)
    found, expected = (load_weights(w / "weights").params for w in (tmp_path, run(*BINS)))
    for name in ("enc_8x8_conv", "dec_8x8_aux_conv"):
        kernel = expected[name]["kernel"]
        np.testing.assert_allclose(found[name]["kernel"], kernel, atol=1e-4 * np.abs(kernel).max())


def test_metrics_are_those_of_the_steps_that_update(run):
    lines = read_metrics(run("dmd2"))
    assert {"loss_gan_generator", "loss_matching", "loss_generator", "dm_gradient_norm"} <= set(
        lines[0]
    )
    assert all(0 <= line["head_accuracy"] <= 1 and line["loss_head"] > 0 for line in lines)
    # The head's two losses at ln 2 would be a head that its input does not reach.
    assert all(abs(line["loss_gan_generator"] - np.log(2)) > 1e-3 for line in lines)


def test_a_start_from_an_earlier_run_has_a_fresh_head(run, tiny):
    earlier = run("dmd2")
    starts = [f"--config.start.{player}={earlier}" for player in ("generator", "fake_score")]
    config = load_config(f"{FAMILY}:dmd2", [tiny[2], *starts])
    setting = setting_of(config, teacher_of(config))
    objective = setting.method.objective(config)
    state = initial_state(objective, setting.frozen, setting.starts, seed=0)
    players = {name: player.params for name, player in state.players.items()}
    assert params_sha256(players["generator"]) == sha256(earlier)
    of_fake = load_weights(earlier, player="fake_score").params
    assert params_sha256(players["fake_score"]["network"]) == params_sha256(of_fake)
    trained = restore_subtree(earlier / "checkpoints", ["players/fake_score/params/head"])[2]
    fresh = players["fake_score"]["head"]
    assert params_sha256(fresh) != params_sha256(trained)
    again = initial_state(objective, setting.frozen, seed=0).players["fake_score"].params["head"]
    assert params_sha256(fresh) == params_sha256(again)


def test_a_generator_of_four_steps_is_sampled_in_four(run, tmp_path, capsys):
    workdir = run("dmd2", "--config.objective.num_steps=4")
    for weights in (workdir, workdir / "weights"):
        assert load_weights(weights).generator == {"num_steps": 4}
    succeeds("sample", "--weights", workdir, "--num", 8, "--out", tmp_path / "four.npy")
    options = ("--sampler", "few-step", "--steps", 4)
    succeeds("sample", "--weights", workdir, "--num", 8, *options, "--out", tmp_path / "asked.npy")
    succeeds("sample", "--weights", workdir, "--num", 8, "--steps", 2, "--out", tmp_path / "2.npy")
    four, asked, two = (np.load(tmp_path / f"{name}.npy") for name in ("four", "asked", "2"))
    np.testing.assert_array_equal(four, asked)
    assert np.abs(four - two).max() > 1e-3
    line = fails(capsys, "sample", "--weights", workdir, "--steps", 3, "--out", tmp_path / "3.npy")
    assert "3 steps of a generator; expected a number of at least 1 that divides the sche" in line


def test_sids_generator_is_sampled_at_its_own_level(run, tiny, tmp_path):
    workdir = run("sid")
    assert load_weights(workdir / "weights").generator == {"sigma_init": 2.5}
    succeeds("sample", "--weights", workdir, "--num", 2, "--out", tmp_path / "own.npy")
    config = json.loads((workdir / "weights" / "config.json").read_text())
    assert config["generator"] == {"sigma_init": 2.5}
    # The weights alone, without that, are asked at sigma = 80.
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((workdir / "weights/model.safetensors").read_bytes())
    (bare / "config.json").write_text(json.dumps({"network": config["network"]}))
    succeeds("sample", "--weights", bare, "--num", 2, "--out", tmp_path / "last.npy")
    own, last = (np.load(tmp_path / f"{name}.npy") for name in ("own", "last"))
    assert np.abs(own - last).max() > 0.1


def test_other_samplers_of_a_generator_at_its_own_level_are_refused(run, tmp_path, capsys):
    out = tmp_path / "x.npy"
    line = fails(
        capsys, "sample", "--weights", run("sid"), "--sampler", "few-step", "--num", 2, "--out", out
    )
    assert "few-step with a generator that is held at sigma = 2.5; expected one-step" in line


def test_a_teachers_workdir_is_sampled_as_a_teacher(run, tiny, tmp_path):
    workdir = tmp_path / "teacher"
    options = ("--config", f"{FAMILY}:sid", "--workdir", workdir)
    succeeds("teacher", *options)
    assert load_weights(workdir).generator == {}


def test_labelled_images_teach_a_network_without_classes(tmp_path):
    options = ("--config", TINY, "--config.network.label_dim=0", "--workdir", tmp_path / "teacher")
    named = tmp_path / "images"
    for index, name in enumerate(("cat", "dog")):
        for number in range(8):
            path = named / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 90 * index + number, np.uint8)).save(path)
    succeeds("teacher", *options, f"--config.data.images={named}", "--config.teaching.batch_size=8")
    succeeds("sample", "--weights", tmp_path / "teacher", "--num", 2, "--out", tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dmd2", "data.images=", "config.data.images is empty; expected real images"),
        ("dmd2", "data.images=pad2:digits", "pad2:digits: images of 12x12, expected resolution 8"),
        ("dmd2", "objective.num_steps=3", "config.objective: 3 steps of a generator"),
        ("f_distill", "objective.divergence=chi", "expected one of rkl, kl, js, softened_rkl"),
        ("sid", "objective.sigma_init=100.0", "config.objective: sigma_init=100; expected"),
        ("sid", "objective.distance=l2", "the config has no key objective.distance"),
    ],
)
def test_impossible_configs_are_refused(tiny, tmp_path, capsys, name, override, message):
    line = fails(
        capsys, "train", *arguments(tiny, name, f"--config.{override}"), "--workdir", tmp_path
    )
    assert message in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_record_of_the_generator_is_refused(run, tmp_path, capsys):
    weights = run("sid") / "weights"
    (tmp_path / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    network = json.loads((weights / "config.json").read_text())["network"]
    cases = {
        f"num_steps is {value!r}; expected a positive number": {"num_steps": value}
        for value in ("many", -1, 2.5)
    }
    cases |= {f"generator is {value!r}; expected a dict": value for value in ([1], "x", None)}
    for message, generator in cases.items():
        content = {"network": network, "generator": generator}
        (tmp_path / "config.json").write_text(json.dumps(content))
        out = tmp_path / "x.npy"
        assert message in fails(capsys, "sample", "--weights", tmp_path, "--num", 2, "--out", out)
