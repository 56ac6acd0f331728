"""The regression's distance as a config names it, and training with it."""

import json
import re

import numpy as np
import pytest
from commands import fails, succeeds
from once import once

from dmd_jax.config import default_config
from dmd_jax.distillation.from_config import distance_of, lpips_of
from dmd_jax.errors import UserError
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.storage.judge_weights import LPIPS, load_auxiliary, save_auxiliary
from dmd_jax.storage.weights import load_weights, params_sha256

COLOUR, GREY = (32, 32, 3), (8, 8, 1)


@pytest.fixture
def config(lpips_file):
    config = default_config()
    config.lpips.weights = str(lpips_file)
    return config


def test_the_default_is_the_papers_lpips(config, golden):
    """Average pooling at 224 pixels, as PIQ computed it for the golden row; 1e-4 absolute."""
    distance, params = distance_of(config, COLOUR), lpips_of(config)
    arrays = golden("lpips_vgg16")
    x, y = (arrays[name].transpose(0, 2, 3, 1) for name in ("x32", "y32"))
    found = once(distance)(params, x, y)
    np.testing.assert_allclose(found, arrays["piq_avgpool_bilinear224"], rtol=0, atol=1e-4)


def test_grey_images_are_shown_three_times(config):
    config.lpips.repeat_grey = True
    config.lpips.resolution = 16
    distance, params = distance_of(config, GREY), lpips_of(config)
    colour = distance_of(config, (8, 8, 3))
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (2, 3, *GREY)).astype(np.float32)
    of_grey = once(distance)(params, x, y)
    of_colour = once(colour)(params, x.repeat(3, -1), y.repeat(3, -1))
    np.testing.assert_allclose(of_grey, of_colour, rtol=1e-6)


def test_l2_and_no_regression_need_no_weights():
    config = default_config()
    config.objective.distance = "l2"
    assert distance_of(config, COLOUR) is None
    config.objective.distance, config.objective.regression_weight = "lpips", 0.0
    assert distance_of(config, COLOUR) is None


@pytest.mark.parametrize(
    "overrides, shape, message",
    [
        ({}, GREY, "these images are grey; expected config.lpips.repeat_grey=True"),
        ({}, (8, 8, 4), "config.lpips: VGG16 got images of shape (1, 8, 8, 4)"),
        ({"lpips.pooling": "median"}, COLOUR, "config.lpips: LPIPS pooling is 'median'"),
        ({"lpips.resolution": 8}, COLOUR, "config.lpips: VGG16 got images of 8 pixels"),
        ({"lpips.resolution": 0}, (8, 8, 3), "config.lpips: VGG16 got images of 8 pixels"),
        ({}, COLOUR, "config.lpips.weights is empty; make one with: pip install"),
        ({"lpips.weights": "none.safetensors"}, COLOUR, "none.safetensors"),
    ],
)
def test_what_lpips_cannot_do_is_refused(overrides, shape, message):
    config = default_config()
    config.update_from_flattened_dict(overrides)

    def both():
        return distance_of(config, shape), lpips_of(config)

    with pytest.raises(UserError, match=re.escape(message)):
        both()


def test_training_with_lpips_refuses_to_start_without_weights(tiny, capsys, tmp_path):
    line = fails(
        capsys,
        *("train", *tiny, "--workdir", tmp_path / "run"),
        *("--config.objective.distance=lpips", "--config.lpips.repeat_grey=True"),
    )
    assert "dmd-jax convert lpips" in line and "dmd_jax[lpips]" in line
    assert not (tmp_path / "run").exists()


def test_train_with_lpips_resumes_to_the_same_bits(tiny, lpips_file, capsys, tmp_path):
    arguments = (
        *("train", *tiny, "--config.objective.distance=lpips", "--config.lpips.repeat_grey=True"),
        *("--config.lpips.resolution=16", f"--config.lpips.weights={lpips_file}"),
    )
    runs = tmp_path / "whole", tmp_path / "parts"
    succeeds(*arguments, "--workdir", runs[0], "--config.steps=4")
    for steps in (2, 4):
        succeeds(*arguments, "--workdir", runs[1], f"--config.steps={steps}")
    whole, parts = (params_sha256(load_weights(run).params) for run in runs)
    assert whole == parts
    # LPIPS of an untrained pair is of order 0.1 to 1; the mean squared error is not used.
    assert 0.01 < read_metrics(runs[0])[-1]["loss_regression"] < 2

    other = tmp_path / "other.safetensors"
    params = load_auxiliary(lpips_file, LPIPS)
    params["heads"]["block1"][0] *= 1 + 1e-6  # LPIPS all the same, to other bits
    save_auxiliary(other, LPIPS, params, source="other", source_sha256="0" * 64)
    line = fails(capsys, "train", "--workdir", runs[1], f"--config.lpips.weights={other}")
    assert "expected the same teacher and data" in line
    saved = json.loads((runs[1] / "config.json").read_text())["config"]
    assert saved["lpips"]["weights"] == str(lpips_file)
