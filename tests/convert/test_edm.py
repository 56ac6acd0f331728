"""EDM's state dicts, and `dmd-jax convert edm`: what is converted, left out, and refused."""

from __future__ import annotations

import hashlib
import json
import math

import edm_pickle
import jax
import numpy as np
import pytest
from commands import TINY, fails, succeeds
from safetensors.numpy import save_file
from torch_bytes import tensor, zip_file

from dmd_jax.config import load_config
from dmd_jax.convert.edm import network_from_init_kwargs, params_from_state_dict
from dmd_jax.errors import UserError
from dmd_jax.models import complete
from dmd_jax.storage.weights import load_weights, params_sha256


@pytest.fixture
def checkpoint(golden):
    arrays = golden("songunet_ncsnpp_uncond")
    state_dict = {k.removeprefix("param/"): v for k, v in arrays.items() if k[:6] == "param/"}
    return state_dict, network_from_init_kwargs(json.loads(arrays["kwargs"].item()))


def test_layouts(checkpoint):
    state_dict, network = checkpoint
    params = params_from_state_dict(state_dict, network)
    block = params["enc_8x8_block0"]
    kernel = state_dict["model.enc.8x8_block0.conv0.weight"]  # OIHW
    assert kernel.shape == (32, 16, 3, 3) and block["conv0"]["kernel"].shape == (3, 3, 16, 32)
    assert block["conv0"]["kernel"][0, 2, 5, 7] == kernel[7, 5, 0, 2]
    affine = state_dict["model.enc.8x8_block0.affine.weight"]  # [out, in]
    assert block["affine"]["kernel"][3, 9] == affine[9, 3]
    np.testing.assert_array_equal(
        block["norm0"]["scale"], state_dict["model.enc.8x8_block0.norm0.weight"]
    )
    np.testing.assert_array_equal(params["map_noise"]["freqs"], state_dict["model.map_noise.freqs"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_everything_in_the_file_is_used_or_left_out_for_a_reason(checkpoint):
    state_dict, network = checkpoint
    used = len(jax.tree.leaves(params_from_state_dict(state_dict, network)))
    filters = sum(key.endswith("resample_filter") for key in state_dict)
    assert used + filters == len(state_dict)


def test_all_differences_are_listed_at_once(checkpoint):
    state_dict, network = checkpoint
    del state_dict["model.map_layer0.bias"], state_dict["model.dec.8x8_in0.qkv.weight"]
    state_dict["model.out_norm.weight"] = np.ones(16)
    state_dict["model.map_layer1.weight"] = np.ones((64, 65))
    with pytest.raises(UserError) as error:
        params_from_state_dict(state_dict, network)
    message = str(error.value)
    assert "2 missing: " in message
    assert "model.map_layer0.bias" in message and "model.dec.8x8_in0.qkv.weight" in message
    assert "1 extra: model.out_norm.weight" in message
    assert "1 misshapen: model.map_layer1.weight (64, 65), expected (64, 64)" in message
    assert "\n" not in message


def test_a_network_of_another_size_is_refused(checkpoint):
    state_dict, network = checkpoint
    with pytest.raises(UserError, match="misshapen: .*, expected .*, \\.\\.\\."):
        params_from_state_dict(state_dict, network | {"model_channels": 32})


def test_a_foreign_resampling_filter_is_refused(checkpoint):
    state_dict, network = checkpoint
    with pytest.raises(UserError, match="differs from the network's resample_filter"):
        params_from_state_dict(state_dict, network | {"resample_filter": [1, 1]})


def test_only_networks_of_edm_are_converted(checkpoint):
    state_dict, _ = checkpoint
    with pytest.raises(UserError, match="network name is 'mlp'; expected one of songunet, dhari"):
        params_from_state_dict(state_dict, {"name": "mlp", "dim": 2})


def test_integers_are_refused(checkpoint):
    state_dict, network = checkpoint
    state_dict["model.map_layer0.bias"] = np.zeros(64, np.int32)
    with pytest.raises(UserError, match="model.map_layer0.bias has type int32; expected floating"):
        params_from_state_dict(state_dict, network)


@pytest.mark.parametrize("end", ["map_layer0.bias", "resample_filter"])
def test_texts_are_refused(checkpoint, end):
    state_dict, network = checkpoint
    key = next(key for key in state_dict if key.endswith(end))
    state_dict[key] = np.full(state_dict[key].shape, "a")
    with pytest.raises(UserError, match=f"{key} has type str32; expected floating point"):
        params_from_state_dict(state_dict, network)


def test_consuming_gives_the_same_and_empties_the_state_dict(checkpoint):
    state_dict, network = checkpoint
    expected = params_from_state_dict(state_dict, network)
    found = params_from_state_dict(state_dict, network, consume=True)
    assert params_sha256(found) == params_sha256(expected)
    assert all(key.endswith("resample_filter") for key in state_dict)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "UNet2D"}, "model_type is UNet2D; expected one of SongUNet, DhariwalUNet"),
        ({"model_type": ["SongUNet"]}, "model_type is a list; expected one of"),
        ({"img_channels": None}, "lack img_channels"),
        ({"depth_wise": True}, "no option 'depth_wise'"),
        ({"sigma_min": 0.002}, "EDM sigma_min is 0.002; expected 0, its default"),
        ({"sigma_max": 80}, "EDM sigma_max is 80; expected inf, its default"),
        ({"sigma_max": [80]}, "EDM sigma_max is a list; expected inf"),
        ({"sigma_max": math.nan}, "EDM sigma_max is nan; expected inf"),
        ({"sigma_data": math.nan}, "sigma_data is nan; expected 0.0001 to 10000.0"),
        ({"sigma_data": 0}, "sigma_data is 0; expected 0.0001 to 10000.0"),
        ({"sigma_data": -0.5}, "sigma_data is -0.5; expected"),
        ({"sigma_data": 10**400}, "sigma_data is 1000.*; expected"),
    ],
)
def test_other_keyword_arguments_are_refused(golden, change, message):
    kwargs = json.loads(golden("songunet_ncsnpp_uncond")["kwargs"].item()) | change
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with pytest.raises(UserError, match=message):
        network_from_init_kwargs(kwargs)


def test_edm_precond_has_a_default_network():
    kwargs = {"img_resolution": 64, "img_channels": 3, "use_fp16": True, "label_dropout": 0.1}
    kwargs |= {"sigma_min": 0.0, "sigma_max": math.inf}
    network = network_from_init_kwargs(kwargs)
    unet = {"name": "dhariwal", "img_resolution": 64, "in_channels": 3, "out_channels": 3}
    assert network == complete(unet)


@pytest.fixture
def dhariwal(golden):
    """(kwargs as JSON, state dict) of the stored ADM network."""
    arrays = golden("dhariwal_adm_cond")
    state_dict = {k.removeprefix("param/"): v for k, v in arrays.items() if k[:6] == "param/"}
    return arrays["kwargs"].item(), state_dict


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_state_dicts_that_say_what_they_are(dhariwal, tmp_path, capsys, suffix):
    kwargs, state_dict = dhariwal
    source, out = tmp_path / f"adm.{suffix}", tmp_path / "weights" / "adm"
    if suffix == "npz":
        np.savez(source, kwargs=kwargs, **state_dict)
    else:
        save_file(state_dict, source, metadata={"kwargs": kwargs})
    succeeds("convert", "edm", source, out)
    network = network_from_init_kwargs(json.loads(kwargs))
    found = load_weights(out)
    assert found.network == network
    assert params_sha256(found.params) == params_sha256(params_from_state_dict(state_dict, network))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found.source == {"file": source.name, "sha256": sha256}
    assert json.loads((out / "config.json").read_text())["source"] == found.source
    assert [path.name for path in out.parent.iterdir()] == ["adm"]

    # Again: nothing to do. Another source: refused, and what is there stays.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    succeeds("convert", "edm", source, out)
    assert f"holds adm.{suffix} already" in capsys.readouterr().out
    assert "says itself" in fails(capsys, "convert", "edm", source, out, "--config", TINY)
    other = tmp_path / "other.npz"
    np.savez(other, kwargs=kwargs, **(state_dict | {"model.out_conv.bias": np.ones(3, np.float32)}))
    assert "exists and holds something else" in fails(capsys, "convert", "edm", other, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_state_dict_of_the_network_of_a_config(tmp_path, capsys):
    network = complete(load_config(str(TINY), []).network.to_dict())
    state_dict = {k: make() for k, make in edm_pickle.drawn_state_dict(network).items()}
    source, out = tmp_path / "tiny.pth", tmp_path / "tiny"
    source.write_bytes(zip_file({key: tensor(value) for key, value in state_dict.items()}))
    assert "expected 'kwargs' in it, or --config" in fails(capsys, "convert", "edm", source, out)
    wide = "--config.network.model_channels=32"
    line = fails(capsys, "convert", "edm", source, out, "--config", TINY, wide)
    assert "does not fit the network" in line and "misshapen" in line and not out.exists()
    out.mkdir()  # an empty folder may be there
    succeeds("convert", "edm", source, out, "--config", TINY)
    found = load_weights(out)
    assert complete(found.network) == network
    expected = params_from_state_dict(state_dict, network)
    assert params_sha256(found.params) == params_sha256(expected)

    # Again: the same network or none, and --config is needed as it was at first.
    capsys.readouterr()
    succeeds("convert", "edm", source, out, "--config", TINY)
    assert "holds tiny.pth already" in capsys.readouterr().out
    line = fails(capsys, "convert", "edm", source, out, "--config", TINY, wide)
    assert f"{out} holds tiny.pth as another network; expected the same --config" in line
    assert "expected 'kwargs' in it, or --config" in fails(capsys, "convert", "edm", source, out)
    assert params_sha256(load_weights(out).params) == params_sha256(expected)
    with_own = tmp_path / "own.npz"
    np.savez(with_own, kwargs="{}", **state_dict)
    line = fails(capsys, "convert", "edm", with_own, tmp_path / "x", "--config", TINY)
    assert "says itself what its network is" in line


def test_bad_sources(dhariwal, tmp_path, capsys):
    kwargs, state_dict = dhariwal

    def line(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return fails(capsys, "convert", "edm", tmp_path / name, tmp_path / "out")

    assert "no such file" in fails(capsys, "convert", "edm", tmp_path / "no.pkl", tmp_path / "out")
    assert "its kwargs are no JSON" in line("a.npz", kwargs="{", **state_dict)
    assert "its kwargs are no JSON object" in line("a.npz", kwargs="[1]", **state_dict)
    kwargs = json.loads(kwargs)
    bad = json.dumps(kwargs | {"spectral_norm": True})
    assert "dhariwal has no option 'spectral_norm'" in line("a.npz", kwargs=bad, **state_dict)
    bad = json.dumps(kwargs | {"num_blocks": 10**9})
    assert "num_blocks is 1000000000" in line("a.npz", kwargs=bad, **state_dict)
    del state_dict["model.map_label.weight"]
    message = line("a.npz", kwargs=json.dumps(kwargs), **state_dict)
    assert "1 missing: model.map_label.weight" in message
    (tmp_path / "b.npz").write_bytes(b"no zip")
    assert "b.npz" in fails(capsys, "convert", "edm", tmp_path / "b.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    (tmp_path / "out").write_text("a file")
    assert "exists and holds something else" in line("a.npz", kwargs="{}")
    assert (tmp_path / "out").read_text() == "a file"


def test_convert_itself_names_its_kinds(capsys):
    assert "invalid choice: 'vae'" in fails(capsys, "convert", "vae", "a", "b")
    assert "KIND" in fails(capsys, "convert")
    assert "unexpected argument '--fast'" in fails(capsys, "convert", "edm", "a", "b", "--fast")
