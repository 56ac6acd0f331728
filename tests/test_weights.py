"""Weights folders keep every bit, and refuse what is not of their own architecture."""

import json

import jax
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser
from dmd_jax.weights import Weights, load_weights, packaged, params_sha256, save_weights

NETWORK = {"name": "mlp", "dim": 2}


@pytest.fixture
def folder(tmp_path):
    params = jax.device_get(build_denoiser(NETWORK).init(jax.random.key(0)))
    save_weights(tmp_path, Weights(NETWORK, params, "a test's"))
    return tmp_path, params


def test_round_trip_to_the_bit(folder):
    path, params = folder
    found = load_weights(path)
    assert found.network == NETWORK and found.description == "a test's"
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    config = json.loads((path / "config.json").read_text())
    assert config["params_sha256"] == params_sha256(found.params) == params_sha256(params)


def test_sha_sees_names_shapes_and_values():
    leaf = np.arange(4, dtype=np.float32)
    trees = [
        {"a": leaf},
        {"b": leaf},
        {"a": leaf.reshape(2, 2)},
        {"a": leaf.astype(np.float16)},
        {"a": leaf[::-1]},
        {"a": {"b": leaf}},
    ]
    assert len({params_sha256(tree) for tree in trees}) == len(trees)


def test_another_architecture_is_refused(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    config["network"]["dim"] = 3
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"another architecture.*expected \("):
        load_weights(path)
    config["network"]["name"] = "unknown"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="network name is 'unknown'"):
        load_weights(path)


def test_the_digits_teacher_ships_whole():
    folder = packaged("digits_teacher")
    config = json.loads((folder / "config.json").read_text())
    assert params_sha256(load_weights(folder).params) == config["params_sha256"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2e6
