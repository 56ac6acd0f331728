"""The parts of a text-to-image folder, and what does not fit among them."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
from diffusers_folder import UNET, state_dict

from dmd_jax.convert.torch_layout import from_torch, torch_key
from dmd_jax.errors import UserError
from dmd_jax.models import abstract_params, complete
from dmd_jax.storage.seals import read_sealed, write_sealed
from dmd_jax.storage.weights import Weights, load_weights, network_of, packaged, save_weights
from dmd_jax.teachers.families import family_of, load_pipeline
from dmd_jax.teachers.stable_diffusion import text_encoder
from dmd_jax.teachers.text_parts import load_decoder, load_text_encoder, parts_folder
from dmd_jax.teachers.tokenizer import load_tokenizer


@pytest.fixture
def copy(text_weights, tmp_path):
    return shutil.copytree(text_weights, tmp_path / "copy")


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def edit(path, **changes):
    write_sealed(path, read_sealed(path, "a test's")[0] | changes)


def test_bfloat16_is_near_float32(text_weights):
    tokens = load_tokenizer(text_weights / "tokenizer").encode(["a red cat"])
    text = load_text_encoder(text_weights)
    full, half = (
        jax.jit(text_encoder(text.network, dtype=dtype))(text.params, tokens)
        for dtype in ("float32", "bfloat16")
    )
    assert full.dtype == half.dtype == np.float32 and full.shape == (1, 77, 16)
    assert np.any(full != half)
    close(half, full, 0.05)


def test_parts_are_found_with_the_weights_the_run_or_as_told(text_weights, tmp_path):
    assert family_of(network_of(text_weights)).takes == "text"
    assert family_of(network_of(packaged("digits_teacher"))).takes == "labels"
    assert parts_folder(text_weights) == text_weights
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(text_weights / name, run / "weights")
    bare = run / "weights"
    for parts in (None, text_weights):
        (run / "config.json").write_text('{"config": {"teacher": {"weights": ""}}}')
        if parts is None:
            with pytest.raises(UserError, match=r"has no text_encoder.*expected --parts DIR"):
                parts_folder(bare)
        else:
            assert parts_folder(bare, parts) == text_weights
    with pytest.raises(UserError, match="--parts .*run has no text_encoder"):
        parts_folder(bare, run)
    teacher = {"config": {"teacher": {"weights": str(text_weights)}}}
    (run / "config.json").write_text(json.dumps(teacher))
    assert parts_folder(run) == parts_folder(bare) == text_weights
    found = load_pipeline(bare)
    assert found.weights.network == load_weights(text_weights).network
    # A run whose teacher is a run.
    teacher["config"]["teacher"]["weights"] = str(run)
    second = tmp_path / "second"
    second.mkdir()
    (second / "config.json").write_text(json.dumps(teacher))
    assert parts_folder(second) == text_weights
    (run / "config.json").write_text(json.dumps(teacher))  # its own teacher
    with pytest.raises(UserError, match="expected --parts DIR"):
        parts_folder(second)


def test_what_does_not_fit_is_named(copy, text_weights):
    edit(copy / "scheduler.json", timestep_spacing="log")
    with pytest.raises(UserError, match="timestep_spacing is 'log'; expected one of leading"):
        load_pipeline(copy)
    edit(copy / "scheduler.json", timestep_spacing="leading", set_alpha_to_one=None)
    with pytest.raises(UserError, match="set_alpha_to_one is None"):
        load_pipeline(copy)
    (copy / "scheduler.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler.json cannot be read"):
        load_pipeline(copy)
    shutil.copy(text_weights / "scheduler.json", copy)
    shutil.rmtree(copy / "taesd")
    with pytest.raises(UserError, match="no taesd folder"):
        load_pipeline(copy, decoder="taesd")
    with pytest.raises(UserError, match="decoder 'best'; expected one of vae, taesd"):
        load_pipeline(copy, decoder="best")
    # A vae/ may hold the small one itself.
    shutil.rmtree(copy / "vae")
    shutil.copytree(text_weights / "taesd", copy / "vae")
    assert load_decoder(copy, "taesd").network["name"] == "autoencoder_tiny"
    assert load_decoder(copy, "vae").network["name"] == "autoencoder_tiny"
    shutil.rmtree(copy / "vae")
    shutil.copytree(text_weights / "text_encoder", copy / "vae")
    with pytest.raises(UserError, match="vae is of network 'clip_text'; expected autoencoder_kl"):
        load_pipeline(copy)
    shutil.rmtree(copy / "vae")
    shutil.copytree(text_weights / "vae", copy / "vae")
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=78)
    with pytest.raises(UserError, match="makes 78 tokens; expected at most 77"):
        load_pipeline(copy)
    with pytest.raises(UserError, match="clip_text denoises nothing; expected .*unet2d_condition"):
        load_pipeline(text_weights / "text_encoder", parts=text_weights)


def test_parts_of_another_width(text_weights, tmp_path):
    for options, expected in (
        ({"cross_attention_dim": 32}, "hidden_size 16; expected 32"),
        ({"in_channels": 3, "out_channels": 3}, "latent_channels 4; expected 3"),
    ):
        network = complete({"name": "unet2d_condition"} | UNET | options)
        arrays = state_dict(network)
        flat = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
        leaves = {path: from_torch(path, arrays[torch_key(path)]) for path in flat}
        params = flax.traverse_util.unflatten_dict(leaves, sep="/")
        save_weights(tmp_path / "unet", Weights(network, params, "drawn"))
        with pytest.raises(UserError, match=expected):
            load_pipeline(tmp_path / "unet", parts=text_weights)


def test_parts_are_for_text_alone(text_weights):
    with pytest.raises(UserError, match="are no text-to-image weights; expected no parts"):
        load_pipeline(packaged("digits_teacher"), parts=text_weights)
