"""The paper's Figure 3 comes out: its three outcomes, as numbers, from the command."""

import dataclasses
import json

import numpy as np
import pytest
from commands import ROOT, fails, succeeds
from PIL import Image

from dmd_jax.commands.toy import OBJECTIVES
from dmd_jax.commands.toy_problem import make_plane, measure
from dmd_jax.config import load_config
from dmd_jax.objectives import DMD
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.training.train_step import initial_state

CONFIG = ROOT / "configs" / "toy2d.py"
# Half the configuration's steps: the outcomes are there already.
STEPS = 2000


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    succeeds("toy", "--config", CONFIG, "--workdir", folder, f"--config.steps={STEPS}")
    return folder


@pytest.fixture(scope="module")
def panels(workdir):
    return json.loads((workdir / "results.json").read_text())["panels"]


@pytest.fixture(scope="module")
def plane():
    return make_plane(load_config(str(CONFIG), ["--config.toy.num_samples=1000"]))


def test_the_fakes_start_as_one_cluster_near_the_first_mode(panels):
    near, far = panels["initial"]["modes"]
    assert near["share"] > 0.9
    assert far["share"] == 0
    # The cluster's centre is 0.45 sqrt(2) = 0.636 from the mode's, its width half the mode's.
    assert near["distance"] == pytest.approx(0.636, abs=0.03)
    assert near["spread"] == pytest.approx(0.5, abs=0.05)


def test_the_real_score_alone_collapses_them_onto_the_nearest_peak(panels):
    near, far = panels["real_score"]["modes"]
    assert near["share"] >= 0.99
    assert far["share"] == 0
    assert near["spread"] < 0.1
    assert near["distance"] < 0.02


def test_the_score_difference_spreads_them_over_the_nearest_mode(panels):
    near, far = panels["real_minus_fake"]["modes"]
    assert near["share"] >= 0.99
    assert far["share"] < 0.01
    assert 0.85 < near["spread"] < 1.15
    assert near["distance"] < 0.03


def test_regression_brings_both_modes(panels):
    for mode in panels["full"]["modes"]:
        assert 0.42 < mode["share"] < 0.58
        assert 0.85 < mode["spread"] < 1.15
        assert mode["distance"] < 0.05
    assert panels["full"]["stray"] < 0.06


def test_metrics_are_finite_and_the_fake_score_learns(workdir):
    for objective in ("real_score", "real_minus_fake", "full"):
        lines = read_metrics(workdir / objective)
        assert [line["step"] for line in lines] == list(range(200, STEPS + 1, 200))
        assert np.all(np.isfinite([list(line.values()) for line in lines]))
        assert all(line["dm_nonfinite"] == 0 for line in lines)
        assert all(("loss_regression" in line) == (objective == "full") for line in lines)
    # An EDM denoiser's loss of weight 1 is about 1 before it learns. The real score alone asks no
    # fake score, and none is trained.
    for objective in ("real_minus_fake", "full"):
        assert 0.5 < read_metrics(workdir / objective)[-1]["loss_fake_score"] < 0.95
    assert not any("loss_fake_score" in line for line in read_metrics(workdir / "real_score"))
    # The squared distance of the cluster to a mode, halved for the two axes, is on average over
    # both (0.45^2 + 1.95^2 + 2 * 0.45^2) / 4 = 1.10, and the widths add 0.2^2 + 0.1^2. What z and
    # y share, about 0.1, and the first line's 50 updates take some of it away.
    regression = [line["loss_regression"] for line in read_metrics(workdir / "full")]
    assert regression[0] == pytest.approx(1.15, abs=0.15)
    assert regression[-1] < 0.15


def test_the_picture_has_its_colours(workdir):
    pixels = np.asarray(Image.open(workdir / "figure3.png"))
    assert pixels.ndim == 3 and pixels.shape[2] == 3
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    assert np.sum(red - blue > 100) > 1000  # fakes
    assert np.sum(blue - red > 50) > 1000  # real samples


def test_a_finished_run_is_kept(workdir, capsys):
    before = (workdir / "results.json").read_bytes()
    assert "results.json exists" in fails(capsys, "toy", "--config", CONFIG, "--workdir", workdir)
    assert (workdir / "results.json").read_bytes() == before


def test_another_objective_is_refused(tmp_path, capsys):
    path = tmp_path / "other.py"
    path.write_text(
        "from dmd_jax.config import load_config, with_objective\n"
        f"get_config = lambda: with_objective(load_config({str(CONFIG)!r}, []), 'sid')\n"
    )
    line = fails(capsys, "toy", "--config", path, "--workdir", tmp_path / "w")
    assert "config.objective.name is sid; expected dmd, of which the panels are" in line


def test_every_objective_starts_from_the_same_cluster(plane):
    settings = DMD(batch_size=4, regression_batch_size=4, distance="l2")
    initial = []
    for changes in OBJECTIVES.values():
        objective = plane.objective(dataclasses.replace(settings, **changes))
        state = initial_state(objective, plane.frozen, seed=0)
        params = state.players["generator"].params
        initial.append(plane.generate(params, plane.latents, None))
    for other in initial[1:]:
        np.testing.assert_array_equal(other, initial[0])
    expected = np.array([-0.75, 0.45]) + 0.1 * np.asarray(plane.latents)
    np.testing.assert_allclose(initial[0], expected, atol=1e-6)


def test_each_half_of_the_latents_is_paired_with_one_mode(plane):
    z, y = np.asarray(plane.pairs["z_ref"]), np.asarray(plane.pairs["y_ref"])
    # The mixture is its own mirror image, so no trajectory crosses the line between the modes.
    assert np.all(np.sign(z[:, 0]) == np.sign(y[:, 0]))
    found = measure(y, plane)
    # 512 samples: the share's standard error is 0.022, the spread's 1/sqrt(4 * 256) = 0.031.
    for mode in found["modes"]:
        assert mode["share"] == pytest.approx(0.5, abs=0.08)
        assert mode["spread"] == pytest.approx(1.0, abs=0.1)


def test_measure_counts_by_hand(plane):
    square = 0.1 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    points = np.vstack([square - np.array([1.1, 0.0]), (1.2, 0.5), (0.0, 0.0), (1.2, 0.9)])
    near, far = measure(points, plane)["modes"]
    assert near == pytest.approx({"share": 4 / 7, "spread": 0.1 / 0.2, "distance": 0.1})
    assert far == pytest.approx({"share": 1 / 7, "spread": 0.0, "distance": 0.5})
    assert measure(points, plane)["stray"] == pytest.approx(2 / 7)
    empty = measure(square - np.array([1.2, 0.0]), plane)["modes"][1]
    assert empty == {"share": 0.0, "spread": None, "distance": None}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=4100", "config.steps is 4100; expected a multiple of config.log_every=200"),
        ("objective.generator_every=3", "config.log_every is 200; expected a multiple of"),
        ("batch_size=0", "config.batch_size is 0"),
        ("pairs.count=-1", "config.pairs.count is -1"),
        ("pairs.num_steps=0", "config.pairs.num_steps is 0"),
        ("objective.max_index=1000", "config.objective: min_index=20 and max_index=1000"),
        ("objective.weighting=flat", "config.objective.weighting is 'flat'"),
        ("network.dim=3", "config.network takes samples of shape (3,)"),
        ("toy.sigma_min=0.5", "config.toy.sigma_min, sigma_max is (0.5, 0.25)"),
        ("toy.mode_std=-1.0", "config.toy.mode_std is -1.0; expected more than 0"),
        ("toy.center=(1.0,)", "config.toy.center is (1.0,); expected 2 numbers"),
        ("toy.generator_depth=0", "config.toy.generator_depth is 0"),
        ("toy.width=3", "the config has no key toy.width"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, capsys, override, named):
    argv = ("toy", "--config", CONFIG, "--workdir", tmp_path, f"--config.{override}")
    assert named in fails(capsys, *argv)
    assert not (tmp_path / "results.json").exists()


def test_a_config_of_another_command_is_named(tmp_path, capsys):
    argv = ("toy", "--config", ROOT / "configs" / "digits.py", "--workdir", tmp_path)
    assert "the config has no part toy" in fails(capsys, *argv)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    overrides = ("steps=8", "log_every=8", "optimizer.fake_score.learning_rate=1e30")
    argv = [f"--config.{override}" for override in overrides]
    message = fails(capsys, "toy", "--config", CONFIG, "--workdir", tmp_path, *argv)
    assert "of the objective real_minus_fake is" in message and "at step" in message
    assert not (tmp_path / "results.json").exists()
