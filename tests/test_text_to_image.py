"""The parts of a text-to-image folder, and latents and images of tokens."""

import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
from diffusers_folder import UNET, state_dict

from dmd_jax.convert.torch_layout import from_torch, torch_key
from dmd_jax.errors import UserError
from dmd_jax.generation import draw_latents
from dmd_jax.models import abstract_params, build_network, complete
from dmd_jax.seals import read_sealed, write_sealed
from dmd_jax.text_parts import load_decoder, parts_folder
from dmd_jax.text_to_image import (
    LatentMaker,
    image_decoder,
    is_text_to_image,
    load_pipeline,
    pixels_a_latent,
    text_encoder,
)
from dmd_jax.weights import Weights, load_weights, save_weights

# Of the last and of the second noise level, from the betas of Stable Diffusion.
_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BARS = np.cumprod(1 - _BETAS)


@pytest.fixture(scope="module")
def pipeline(text_weights):
    return load_pipeline(text_weights)


@pytest.fixture
def copy(text_weights, tmp_path):
    return shutil.copytree(text_weights, tmp_path / "copy")


@pytest.fixture(scope="module")
def raw(pipeline):
    """The UNet's own answer to z [3, 8, 8, 4] and tokens, from the networks of the parts."""
    unet, text = (build_network(w.network) for w in (pipeline.unet, pipeline.text_encoder))

    @jax.jit
    def run(unet_params, text_params, z, time, tokens):
        context = text.apply({"params": text_params}, tokens).last_hidden
        return unet.apply({"params": unet_params}, z, time, context)

    def answer(z, time, tokens):
        times = np.full(len(z), time, np.float32)
        return np.asarray(run(pipeline.unet.params, pipeline.text_encoder.params, z, times, tokens))

    return answer


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def edit(path, **changes):
    write_sealed(path, read_sealed(path, "a test's")[0] | changes)


def test_one_step_is_epsilon_at_the_last_level_made_x0(pipeline, raw):
    maker = LatentMaker(pipeline, sampler="one-step", batch_size=8)
    tokens = pipeline.tokenizer.encode(["a red cat", "", "the dog"])
    z = draw_latents(0, 0, 3, (8, 8, 4))
    latents = maker(z, tokens)
    noise = raw(z, 999.0, tokens)
    alpha, sigma = np.sqrt(ALPHA_BARS[999]), np.sqrt(1 - ALPHA_BARS[999])
    assert latents.shape == z.shape and latents.dtype == np.float32
    # The noise is divided by alpha, which magnifies its rounding.
    close(latents, (z - sigma * noise) / alpha, 5e-6)
    assert np.abs(latents[0] - latents[1]).max() > 1e-3  # each has its own prompt
    # Nine are a full batch and a filled-up one; a row does not depend on the others.
    many = maker(np.concatenate([z] * 3), np.concatenate([tokens] * 3))
    close(many, np.concatenate([latents] * 3), 1e-6)


def test_guidance_moves_away_from_the_empty_prompt(pipeline, raw):
    """One step of DDIM from the least noise but one: its timestep is the offset, 1."""
    maker = LatentMaker(pipeline, sampler="ddim", num_steps=1, guidance=3.0, batch_size=3)
    z = draw_latents(1, 0, 3, (8, 8, 4))
    tokens = pipeline.tokenizer.encode(["a red cat", "the dog", "a photo"])
    empty = pipeline.tokenizer.encode([""] * 3)
    cond, uncond = raw(z, 1.0, tokens), raw(z, 1.0, empty)
    noise = uncond + 3.0 * (cond - uncond)
    x0 = (z - np.sqrt(1 - ALPHA_BARS[1]) * noise) / np.sqrt(ALPHA_BARS[1])
    # set_alpha_to_one is false in the folder, so that the step ends at the first level.
    expected = np.sqrt(ALPHA_BARS[0]) * x0 + np.sqrt(1 - ALPHA_BARS[0]) * noise
    close(maker(z, tokens), expected, 2e-6)
    assert np.abs(noise - cond).max() > 1e-3


def test_decoders_take_the_latents_of_the_unet(text_weights, pipeline):
    taesd = load_decoder(text_weights, "taesd")
    latents = draw_latents(0, 0, 2, (8, 4, 4))
    for weights, scale in ((pipeline.decoder, np.float32(0.18215)), (taesd, 1)):
        network, params = build_network(weights.network), weights.params
        plain = jax.jit(lambda p, z, n=network: n.apply({"params": p}, z, method="decode"))
        decoded = jax.jit(image_decoder(weights.network))(params, latents)
        assert decoded.shape == (2, 64, 32, 3)
        close(decoded, plain(params, latents / scale), 1e-6)
        assert pixels_a_latent(weights) == 8
        shape = (8, 4, 4)
        maker = LatentMaker(
            pipeline._replace(decoder=weights), sampler="one-step", batch_size=2, latent_shape=shape
        )
        assert maker.image_shape == (64, 32, 3)
        close(maker.decode(latents), decoded, 1e-6)


def test_bfloat16_is_near_float32(pipeline):
    tokens = pipeline.tokenizer.encode(["a red cat"])
    text = pipeline.text_encoder
    full, half = (
        jax.jit(text_encoder(text.network, dtype=dtype))(text.params, tokens)
        for dtype in ("float32", "bfloat16")
    )
    assert full.dtype == half.dtype == np.float32 and full.shape == (1, 77, 16)
    assert np.any(full != half)
    close(half, full, 0.05)


def test_parts_are_found_with_the_weights_the_run_or_as_told(text_weights, tmp_path):
    assert is_text_to_image(text_weights)
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
    assert found.unet.network == load_weights(text_weights).network
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
    with pytest.raises(UserError, match="of network clip_text; expected unet2d_condition"):
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


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"sampler": "heun"}, "unknown sampler 'heun' of text; expected one of one-step, pndm"),
        ({"sampler": "one-step", "guidance": 7.5}, "guidance 7.5 with the sampler one-step"),
        ({"sampler": "pndm", "guidance": -1.0}, "guidance is -1.0; expected a number of at least"),
        ({"sampler": "dpm++", "num_steps": 0}, "num_steps is 0; expected 1 to 1000"),
        ({"sampler": "unipc", "num_steps": 1001}, "num_steps is 1001"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_compiled(pipeline, options, expected):
    with pytest.raises(UserError, match=expected):
        LatentMaker(pipeline, **options)


def test_tokens_outside_of_the_vocabulary(pipeline):
    maker = LatentMaker(pipeline, sampler="one-step", batch_size=1)
    tokens = np.zeros((1, 77), np.int32)
    tokens[0, 5] = 532
    with pytest.raises(UserError, match=r"token 532 at \[0, 5\] is outside the vocabulary"):
        maker(draw_latents(0, 0, 1, (8, 8, 4)), tokens)
