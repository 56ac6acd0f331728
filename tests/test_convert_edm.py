"""EDM's state dicts: what is converted, what is left out, what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from dmd_jax.convert.edm import network_from_init_kwargs, params_from_state_dict
from dmd_jax.errors import UserError


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
    assert used + filters + 1 == len(state_dict)  # and map_augment.weight


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


def test_only_songunet_is_converted(checkpoint):
    state_dict, _ = checkpoint
    with pytest.raises(UserError, match="network name is 'mlp'; expected 'songunet'"):
        params_from_state_dict(state_dict, {"name": "mlp", "dim": 2})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "DhariwalUNet"}, "model_type is 'DhariwalUNet'; expected 'SongUNet'"),
        ({"img_channels": None}, "lack img_channels"),
        ({"depth_wise": True}, "no option 'depth_wise'"),
    ],
)
def test_other_keyword_arguments_are_refused(golden, change, message):
    kwargs = json.loads(golden("songunet_ncsnpp_uncond")["kwargs"].item()) | change
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with pytest.raises(UserError, match=message):
        network_from_init_kwargs(kwargs)
