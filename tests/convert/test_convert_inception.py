"""`dmd-jax convert inception`, with drawn weights: the published file is known by its SHA-256."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
import pytest
import torch_bytes
from commands import fails, succeeds
from inception_weights import drawn_state_dict

from dmd_jax.convert.inception import params_from_state_dict
from dmd_jax.errors import UserError
from dmd_jax.storage.judge_weights import INCEPTION, describe_auxiliary, load_auxiliary


@pytest.fixture
def state_dict(golden):
    return drawn_state_dict(golden("fid_inception"))


@pytest.fixture
def source(state_dict, tmp_path):
    """As pytorch-fid publishes it, in PyTorch's format before the zip."""
    path = tmp_path / "inception.pth"
    tensors = {key: torch_bytes.tensor(array) for key, array in state_dict.items()}
    path.write_bytes(torch_bytes.legacy_file(tensors))
    return path


def test_the_published_file_is_known_by_its_sha256(monkeypatch, state_dict, source, tmp_path):
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr("dmd_jax.convert.inception.PUBLISHED_SHA256", sha256[:8])
    succeeds("convert", "inception", source, tmp_path / "out")
    described = describe_auxiliary(tmp_path / "out", INCEPTION)
    assert described["source"] == "inception.pth"
    assert (described["source_sha256"], described["recognised"]) == (sha256, "yes")
    loaded = load_auxiliary(tmp_path / "out", INCEPTION)
    expected = params_from_state_dict(state_dict, "drawn")
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_another_file_is_refused_unless_it_is_wanted(capsys, source, tmp_path):
    out = tmp_path / "out"
    message = fails(capsys, "convert", "inception", source, out)
    assert "expected 6726825d..., the published pt_inception-2015-12-05-6726825d.pth" in message
    assert "--accept-other" in message and not out.exists()
    succeeds("convert", "inception", source, out, "--accept-other")
    assert "NOT the published weights" in capsys.readouterr().out
    assert describe_auxiliary(out, INCEPTION)["recognised"] == "no"
    assert f"{out} exists already" in fails(capsys, "convert", "inception", source, out)
    absent = tmp_path / "absent.pth"
    assert str(absent) in fails(capsys, "convert", "inception", absent, tmp_path / "other")


def test_batch_norms_are_folded(state_dict):
    """At one position: gamma (w x - mean) / sqrt(variance + 0.001) + beta."""
    leaves = params_from_state_dict(state_dict, "drawn")["Mixed_6b"]["branch7x7_2"]
    key = "Mixed_6b.branch7x7_2"
    weight = state_dict[f"{key}.conv.weight"][5].astype(np.float64)  # [in, 1, 7]
    gamma, beta, mean, variance = (
        float(state_dict[f"{key}.bn.{name}"][5])
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    x = np.random.default_rng(0).standard_normal(weight.shape)
    expected = gamma * ((weight * x).sum() - mean) / np.sqrt(variance + 1e-3) + beta
    ours = (leaves["kernel"][..., 5].transpose(2, 0, 1) * x).sum() + leaves["bias"][5]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_counts_of_batches_are_left_out(state_dict):
    state_dict["Conv2d_1a_3x3.bn.num_batches_tracked"] = np.array(7)
    params_from_state_dict(state_dict, "drawn")


@pytest.mark.parametrize("dtype", ["U3", "int32", "complex64"])
def test_arrays_of_another_type_are_refused(capsys, state_dict, tmp_path, dtype):
    key = "Mixed_5b.branch1x1.bn.running_var"
    state_dict[key] = np.ones(state_dict[key].shape).astype(dtype)
    path, out = tmp_path / "inception.npz", tmp_path / "out"
    np.savez(path, **state_dict)
    message = fails(capsys, "convert", "inception", path, out)
    assert f"{path}: {key} has type {np.dtype(dtype).name}; expected floating" in message
    assert not out.exists()


def test_torchvisions_inception_is_refused(state_dict):
    state_dict["fc.weight"], state_dict["fc.bias"] = np.zeros((1000, 2048)), np.zeros(1000)
    state_dict["AuxLogits.fc.bias"] = np.zeros(1000)
    del state_dict["Mixed_7c.branch_pool.bn.running_var"]
    with pytest.raises(UserError) as error:
        params_from_state_dict(state_dict, "torchvision.pth")
    message = str(error.value)
    assert message.startswith("torchvision.pth is not pytorch-fid's Inception: 1 missing: Mixed_7c")
    assert "1 extra: AuxLogits.fc.bias" in message
    assert "2 misshapen: fc.weight (1000, 2048), expected (1008, 2048)" in message


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("Mixed_5b.branch1x1.conv.weight", np.nan, "values that are not finite"),
        ("Mixed_5b.branch1x1.bn.running_var", -1.0, "a negative variance"),
    ],
)
def test_values_that_no_network_has_are_refused(state_dict, key, value, message):
    state_dict[key].flat[3] = value
    with pytest.raises(UserError, match=f"drawn: {key} holds {message}"):
        params_from_state_dict(state_dict, "drawn")
