"""Images of labels and of tokens by the one maker; what it refuses before a device sees it."""

import functools

import jax
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.models import build_network
from dmd_jax.sampling.draws import draw_latents
from dmd_jax.sampling.maker import ImageMaker, image_shape
from dmd_jax.storage.weights import packaged
from dmd_jax.teachers.families import load_pipeline
from dmd_jax.teachers.text_parts import load_decoder, load_text_encoder

# Of the last and of the second noise level, from the betas of Stable Diffusion.
_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BARS = np.cumprod(1 - _BETAS)


@pytest.fixture(scope="module")
def pipeline(text_weights):
    return load_pipeline(text_weights)


@pytest.fixture(scope="module")
def raw(text_weights, pipeline):
    """The UNet's own answer to z [3, 8, 8, 4] and tokens, from the networks of the parts."""
    parts = pipeline.weights, load_text_encoder(text_weights)
    unet, text = (build_network(part.network) for part in parts)

    @jax.jit
    def run(unet_params, text_params, z, time, tokens):
        context = text.apply({"params": text_params}, tokens).last_hidden
        return unet.apply({"params": unet_params}, z, time, context)

    def answer(z, time, tokens):
        times = np.full(len(z), time, np.float32)
        return np.asarray(run(*(part.params for part in parts), z, times, tokens["tokens"]))

    return answer


def x0_of(maker, z, tokens):
    return np.concatenate(list(maker.batches(z, tokens, decoded=False)))


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_one_step_is_epsilon_at_the_last_level_made_x0(pipeline, raw):
    maker = ImageMaker(pipeline, sampler="one-step", batch_size=8)
    tokens = pipeline.tokens(["a red cat", "", "the dog"])
    z = draw_latents(0, 0, 3, (8, 8, 4))
    latents = x0_of(maker, z, tokens)
    noise = raw(z, 999.0, tokens)
    alpha, sigma = np.sqrt(ALPHA_BARS[999]), np.sqrt(1 - ALPHA_BARS[999])
    assert latents.shape == z.shape and latents.dtype == np.float32
    # The noise is divided by alpha, which magnifies its rounding.
    close(latents, (z - sigma * noise) / alpha, 5e-6)
    assert np.abs(latents[0] - latents[1]).max() > 1e-3  # each has its own prompt
    # Nine are a full batch and a filled-up one; a row does not depend on the others.
    repeated = {"tokens": np.concatenate([tokens["tokens"]] * 3)}
    many = x0_of(maker, np.concatenate([z] * 3), repeated)
    close(many, np.concatenate([latents] * 3), 1e-6)


def test_guidance_moves_away_from_the_empty_prompt(pipeline, raw):
    """One step of DDIM from the least noise but one: its timestep is the offset, 1."""
    maker = ImageMaker(pipeline, sampler="ddim", num_steps=1, guidance=3.0, batch_size=3)
    z = draw_latents(1, 0, 3, (8, 8, 4))
    tokens = pipeline.tokens(["a red cat", "the dog", "a photo"])
    empty = pipeline.tokens([""] * 3)
    cond, uncond = raw(z, 1.0, tokens), raw(z, 1.0, empty)
    noise = uncond + 3.0 * (cond - uncond)
    x0 = (z - np.sqrt(1 - ALPHA_BARS[1]) * noise) / np.sqrt(ALPHA_BARS[1])
    # set_alpha_to_one is false in the folder, so that the step ends at the first level.
    expected = np.sqrt(ALPHA_BARS[0]) * x0 + np.sqrt(1 - ALPHA_BARS[0]) * noise
    close(x0_of(maker, z, tokens), expected, 2e-6)
    assert np.abs(noise - cond).max() > 1e-3


def test_decoders_take_the_latents_of_the_unet(text_weights):
    latents = draw_latents(0, 0, 2, (8, 4, 4))
    for name, scale in (("vae", np.float32(0.18215)), ("taesd", 1)):
        weights = load_decoder(text_weights, name)
        network, params = build_network(weights.network), weights.params
        plain = jax.jit(lambda p, z, n=network: n.apply({"params": p}, z, method="decode"))
        pipeline = load_pipeline(text_weights, decoder=name)
        decode = functools.partial(jax.jit(pipeline.teacher.decode), pipeline.frozen)
        decoded = decode(latents)
        assert decoded.shape == (2, 64, 32, 3)
        close(decoded, plain(params, latents / scale), 1e-6)
        assert image_shape(pipeline.teacher, pipeline.frozen, (1, 1, 4)) == (8, 8, 3)
        options = {"sampler": "one-step", "batch_size": 2, "sample_shape": (8, 4, 4)}
        maker = ImageMaker(pipeline, **options)
        assert maker.image_shape == (64, 32, 3)
        tokens = pipeline.tokens(["a red cat", "the dog"])
        close(maker(latents, tokens), decode(x0_of(maker, latents, tokens)), 1e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"sampler": "heun"},
            "unknown sampler 'heun' of text; expected one of one-step, few-step, pndm",
        ),
        ({"sampler": "one-step", "guidance": 7.5}, "guidance 7.5 with the sampler one-step"),
        ({"sampler": "pndm", "guidance": -1.0}, "guidance is -1.0; expected a number of at least"),
        ({"sampler": "dpm++", "num_steps": 0}, "num_steps is 0; expected 1 to 1000"),
        ({"sampler": "unipc", "num_steps": 1001}, "num_steps is 1001"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_compiled(pipeline, options, expected):
    with pytest.raises(UserError, match=expected):
        ImageMaker(pipeline, **options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"sampler": "pndm"},
            "unknown sampler 'pndm' of labels; expected one of one-step, few-step, heun",
        ),
        ({"sampler": "heun", "num_steps": 0}, "0 sampling steps; expected at least 1"),
        ({"sampler": "heun", "guidance": 2.0}, "guidance 2; expected 1 for a network of labels"),
        (
            {"sampler": "one-step", "options": {"s_churn": 1.0}},
            "the one-step sampler takes no s_ch",
        ),
        ({"sampler": "euler", "options": {"churn": 1.0}}, "the euler sampler takes no churn"),
    ],
)
def test_impossible_settings_of_labels_are_refused(options, expected):
    with pytest.raises(UserError, match=expected):
        ImageMaker(load_pipeline(packaged("digits_teacher")), **options)


def test_no_sampler_of_text_takes_churn(pipeline):
    with pytest.raises(UserError, match="the ddim sampler takes no s_churn"):
        ImageMaker(pipeline, sampler="ddim", options={"s_churn": 1.0})


def test_tokens_outside_of_the_vocabulary(pipeline):
    maker = ImageMaker(pipeline, sampler="one-step", batch_size=1)
    tokens = np.zeros((1, 77), np.int32)
    tokens[0, 5] = 532
    with pytest.raises(UserError, match=r"token 532 at \[0, 5\] is outside the vocabulary"):
        maker(draw_latents(0, 0, 1, (8, 8, 4)), {"tokens": tokens})


Z = np.zeros((2, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def digits_maker():
    return ImageMaker(load_pipeline(packaged("digits_teacher")), sampler="one-step", batch_size=8)


@pytest.mark.parametrize("z, labels, message", [
    (Z, None, r"labels are None; expected integers \[2\] of the network's 10 classes"),
    (Z, np.array([0, 10]), "label 10; expected 0 to 9"),
    (Z, np.array([-1, 0]), "label -1; expected 0 to 9"),
    (Z, np.array([1]), r"labels are int64 of shape \(1,\); expected integers \[2\]"),
    (Z, np.array([0.0, 1.0]), "labels are float64"),
    (Z[..., 0], np.array([0, 1]), r"latents are float32 of shape \(2, 8, 8\); expected float"),
    (Z[:0], np.array([], int), r"latents are float32 of shape \(0, 8, 8, 1\)"),
    (Z.astype(int), np.array([0, 1]), "latents are int64"),
])  # fmt: skip
def test_makers_of_images(digits_maker, z, labels, message):
    with pytest.raises(UserError, match=message):
        digits_maker(z, {} if labels is None else {"label": labels})


def test_tokens_of_other_names_are_refused(digits_maker, pipeline):
    with pytest.raises(UserError, match="tokens labels; expected label alone"):
        digits_maker(Z, {"labels": np.array([0, 1])})
    maker = ImageMaker(pipeline, sampler="one-step", batch_size=1)
    for tokens, found in (({"label": np.zeros(1)}, "label"), ({}, "are none")):
        with pytest.raises(UserError, match=f"tokens {found}; expected tokens alone"):
            maker(draw_latents(0, 0, 1, (8, 8, 4)), tokens)
