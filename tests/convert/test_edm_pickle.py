"""Pickles in the format of EDM's released networks: to the bit, and without running anything."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import types

import edm_pickle
import numpy as np
import pytest
from commands import ROOT, TINY, succeeds
from edm_pickle import write_edm_pickle
from once import once
from peak_memory import peak_of_convert

from dmd_jax.config import load_config
from dmd_jax.convert.edm import params_from_state_dict
from dmd_jax.convert.edm_pickle import read_edm_pickle
from dmd_jax.errors import UserError
from dmd_jax.method.schedules import edm_level
from dmd_jax.models import complete
from dmd_jax.storage.weights import denoiser_of, load_weights, params_sha256

SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
SMALL |= {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "dropout": 0.13}
DDPMPP = {"name": "songunet", "label_dim": 10, "augment_dim": 9} | SMALL
NCSNPP = {"name": "songunet", "embedding_type": "fourier", "channel_mult_noise": 2} | SMALL
NCSNPP |= {"encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
ADM = {"name": "dhariwal", "label_dim": 10} | SMALL | {"model_channels": 64}
RECONSTRUCT = "_reconstruct_persistent_obj"


def drawn(network):
    return {key: make() for key, make in edm_pickle.drawn_state_dict(network).items()}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("network", [DDPMPP, NCSNPP, ADM], ids=["ddpmpp", "ncsnpp", "adm"])
def test_kwargs_and_state_dict_to_the_bit(tmp_path, network, protocol):
    state_dict, kwargs = drawn(network), edm_pickle.init_kwargs(network)
    write_edm_pickle(tmp_path / "net.pkl", kwargs, state_dict, protocol=protocol)
    found_kwargs, found = read_edm_pickle(tmp_path / "net.pkl")
    assert found_kwargs == kwargs
    assert found.keys() == state_dict.keys()
    for key, array in state_dict.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


def test_the_stored_adm_network_through_the_command(golden, tmp_path):
    arrays = golden("dhariwal_adm_cond")
    state_dict = {k.removeprefix("param/"): v for k, v in arrays.items() if k[:6] == "param/"}
    write_edm_pickle(tmp_path / "adm.pkl", json.loads(arrays["kwargs"].item()), state_dict)
    succeeds("convert", "edm", tmp_path / "adm.pkl", tmp_path / "adm")
    weights = load_weights(tmp_path / "adm")
    expected = params_from_state_dict(state_dict, weights.network)
    assert params_sha256(weights.params) == params_sha256(expected)
    # And they are the network that the reference code ran.
    x, reference = (arrays[name].transpose(0, 2, 3, 1) for name in ("x", "denoised"))
    cond = arrays["labels"].argmax(axis=-1).astype(np.int32)
    level = edm_level(arrays["sigma"])
    denoised = once(denoiser_of(weights).denoise)(weights.params, x, level, cond)
    assert np.abs(denoised - reference).max() < 2e-5 * np.abs(reference).max()


def test_the_builder_as_a_command_and_the_teacher_sampled(tmp_path):
    network = load_config(str(TINY), []).network.to_dict()
    build = [sys.executable, ROOT / "tests" / "helpers" / "edm_pickle.py", "--config", TINY]
    subprocess.run([*build, tmp_path / "net.pkl"], check=True, cwd=tmp_path)
    succeeds("convert", "edm", tmp_path / "net.pkl", tmp_path / "net")
    weights = load_weights(tmp_path / "net")
    assert weights.network == complete(network)
    expected = params_from_state_dict(drawn(network), network)
    assert params_sha256(weights.params) == params_sha256(expected)
    out = tmp_path / "images.npy"
    sampler = ("--sampler", "heun", "--steps", 2, "--num", 3, "--batch-size", 4)
    succeeds("sample", "--weights", tmp_path / "net", *sampler, "--out", out)
    images = np.load(out)
    assert images.shape == (3, 8, 8, 1) and np.isfinite(images).all()


def test_the_drawn_cifar10_network_has_the_released_size():
    network = {"name": "songunet", "img_resolution": 32, "in_channels": 3, "out_channels": 3}
    network |= {"label_dim": 10, "augment_dim": 9, "channel_mult": [2, 2, 2]}
    makers = edm_pickle.drawn_state_dict(network)
    buffers = [key for key in makers if key.endswith("resample_filter")]
    assert sum(makers[key]().size for key in makers.keys() - set(buffers)) == 55_735_299
    assert len(buffers) == 8  # conv0 and skip of two blocks down and two up


def test_memory_is_less_than_three_times_the_file(tmp_path):
    """Two copies of all parameters at no time: measured 1.4 files above what JAX itself takes."""
    network = ADM | {"model_channels": 192, "channel_mult": [1, 3]}
    path = tmp_path / "net.pkl"
    kwargs = edm_pickle.init_kwargs(network)
    write_edm_pickle(path, kwargs, edm_pickle.drawn_state_dict(network))
    size = path.stat().st_size
    assert size > 80e6
    assert peak_of_convert("edm", path, tmp_path / "out") < 2 * size


@pytest.mark.torch
def test_modules_that_torch_itself_pickles(tmp_path, monkeypatch):
    """Real torch modules, whose __reduce__ is EDM's way to make a class travel."""
    import torch

    def rebuild(meta):
        raise AssertionError("never called here")

    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", RECONSTRUCT
    persistence = types.ModuleType("torch_utils.persistence")
    setattr(persistence, RECONSTRUCT, rebuild)
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", persistence)

    class Persistent(torch.nn.Module):
        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
            meta |= {"class_name": type(self).__name__, "state": dict(self.__dict__)}
            return rebuild, (meta,)

    class Conv2d(Persistent):
        def __init__(self, bias):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
            self.bias = torch.nn.Parameter(torch.randn(4).half()) if bias else None
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
            self.register_buffer("nothing", None)
            self.register_buffer("fleeting", torch.ones(2), persistent=False)
            self.skip_scale = np.sqrt(0.5)

    class SongUNet(Persistent):
        def __init__(self):
            super().__init__()
            self.enc = torch.nn.ModuleDict({"8x8_conv": Conv2d(True), "8x8_up": Conv2d(False)})
            self.register_parameter("scale", torch.nn.Parameter(torch.randn(6, 4).t()))

    class EDMPrecond(Persistent):
        def __init__(self):
            super().__init__()
            self.model = SongUNet()
            self._init_args, self._init_kwargs = (8,), {"img_channels": 3, "mult": [1, 2]}

    network = EDMPrecond().eval().requires_grad_(False)
    for protocol in (2, 3, 4, 5):
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": network}, protocol))
        if protocol == 2:  # bytes go through _codecs.encode there
            with pytest.raises(UserError, match="asks for _codecs.encode"):
                read_edm_pickle(tmp_path / "net.pkl")
            continue
        kwargs, found = read_edm_pickle(tmp_path / "net.pkl")
        assert kwargs == {"img_resolution": 8, "img_channels": 3, "mult": [1, 2]}
        expected = network.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype.name == str(value.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[key], value.numpy())
