"""AutoencoderTiny against diffusers, and its refusals."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import draw_parameters, drawn_params, params_of, relative_error

from dmd_jax.errors import UserError
from dmd_jax.models.stable_diffusion.autoencoder_tiny import AutoencoderTiny

TOLERANCE = 5e-5  # of the largest magnitude
SMALL = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (12,) * 4}
TWO_STAGES = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (12, 12),
    "num_encoder_blocks": (2, 0),
    "num_decoder_blocks": (1, 2),
    "latent_channels": 5,
}


def shapes_of(network):
    return jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())["params"]


def apply(network, method):
    return jax.jit(functools.partial(network.apply, method=method))


@pytest.mark.torch
@pytest.mark.parametrize("options", [SMALL, TWO_STAGES], ids=["TAESD's blocks", "two stages"])
def test_latents_and_images_match_pytorch(options):
    import torch
    from diffusers import AutoencoderTiny as TorchAutoencoderTiny

    theirs = draw_parameters(TorchAutoencoderTiny(**options))
    network = AutoencoderTiny(**options)
    variables = {"params": params_of(theirs, network)}
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 32, 40, 3)).astype(np.float32)
    z = 4 * rng.standard_normal((2, 4, 5, network.latent_channels)).astype(np.float32)
    direction = rng.standard_normal(z.shape[0]).astype(np.float32)[:, None, None, None]

    def nchw(array):
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    latents = apply(network, "encode")(variables, images)
    expected = theirs.encode(nchw(images)).latents.detach().permute(0, 2, 3, 1)
    assert relative_error(latents, expected) < TOLERANCE

    @jax.jit
    def decode(z):
        decoded, pullback = jax.vjp(lambda z: network.apply(variables, z, method="decode"), z)
        return decoded, pullback(jnp.broadcast_to(direction, decoded.shape))[0]

    decoded, gradient = decode(z)
    leaf = nchw(z).requires_grad_()
    expected = theirs.decode(leaf).sample
    (expected * nchw(direction)).sum().backward()
    assert relative_error(decoded, expected.detach().permute(0, 2, 3, 1)) < TOLERANCE
    assert relative_error(gradient, leaf.grad.permute(0, 2, 3, 1)) < TOLERANCE


@pytest.mark.torch
def test_defaults_are_those_of_the_configuration_files():
    """A config.json need not have the keys whose value is the default."""
    from diffusers import AutoencoderTiny as TorchAutoencoderTiny

    theirs, ours = TorchAutoencoderTiny().config, AutoencoderTiny()
    options = (*TWO_STAGES, "in_channels", "out_channels", "scaling_factor", "shift_factor")
    assert {o: getattr(ours, o) for o in options} == {o: theirs[o] for o in options}


def test_parameter_count_of_taesd():
    assert (
        sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(AutoencoderTiny()))) == 2_445_063
    )


def test_ranges_of_images_and_latents():
    """With no weights but biases and the outer convolutions' centres, both halves are known."""
    network = AutoencoderTiny(**SMALL)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes_of(network))
    params["encoder"]["layers_14"]["bias"][:] = [1, 2, 3, 4]
    latents = apply(network, "encode")({"params": params}, np.ones((1, 8, 16, 3), np.float32))
    np.testing.assert_array_equal(latents, np.broadcast_to([1.0, 2, 3, 4], (1, 1, 2, 4)))

    # One channel through the decoder: relu(3 tanh(z / 3)), each value on 8x8 pixels.
    for name, size in {"layers_0": 4, "layers_6": 12, "layers_11": 12, "layers_16": 12}.items():
        assert params["decoder"][name]["kernel"].shape[2] == size
        params["decoder"][name]["kernel"][1, 1, 0, 0] = 1
    params["decoder"]["layers_18"]["kernel"][1, 1, 0, :] = [1, 0.5, 0]
    z = np.zeros((1, 1, 3, 4), np.float32)
    z[..., 0] = [0.6, 1e9, -5]
    images = apply(network, "decode")({"params": params}, z)
    first = np.array([3 * math.tanh(0.2), 3.0, 0.0])
    expected = 2 * first[:, None] * np.array([1, 0.5, 0]) - 1
    assert images.shape == (1, 8, 24, 3)
    np.testing.assert_allclose(images[0, 0, ::8], expected, rtol=1e-6)
    np.testing.assert_array_equal(images[:, :, ::8].repeat(8, axis=2), images)


def test_bfloat16_is_near_float32():
    wide, narrow = (AutoencoderTiny(**SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = drawn_params(wide)
    z = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
    expected, actual = (
        apply(network, "decode")({"params": params}, z) for network in (wide, narrow)
    )
    assert actual.dtype == jnp.float32
    assert 0 < np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_channels": 0}, "in_channels is 0; expected 1 to 16384"),
        ({"num_decoder_blocks": (3, 3, 3, 10**9)}, "num_decoder_blocks is .* expected 0 to 64"),
        ({"num_encoder_blocks": ()}, r"num_encoder_blocks is \(\); expected 0 to 64"),
        ({"num_encoder_blocks": (1,) * 40}, "num_encoder_blocks has 40 entries; expected 1 to 16"),
        ({"num_encoder_blocks": (1, 3, 3)}, "encoder_block_out_channels is .* of the 3 entries"),
        ({"decoder_block_out_channels": (8, 8, 8, 4)}, r"is \(8, 8, 8, 4\); .* all equal"),
        ({"scaling_factor": 0}, "scaling_factor is 0; expected a factor that can be divided by"),
        ({"scaling_factor": math.nan}, "scaling_factor is nan; expected 0 to 1000000.0"),
        ({"shift_factor": math.inf}, "shift_factor is inf; expected -1000000.0 to 1000000.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AutoencoderTiny(**SMALL | options)


@pytest.mark.parametrize(
    "method, shape, message",
    [
        ("encode", (1, 8, 12, 3), r"\(1, 8, 12, 3\); expected a height and a width divisible by 8"),
        ("encode", (1, 3, 8, 8), r"image has shape .*; expected \[B, height, width, 3\]"),
        ("decode", (1, 8, 8, 3), r"latent has shape .*; expected \[B, height, width, 4\]"),
        ("decode", (8, 8, 4), r"latent has shape .*; expected \[B, height, width, 4\]"),
    ],
)
def test_inputs_of_another_shape_are_refused(method, shape, message):
    with pytest.raises(UserError, match=message):
        AutoencoderTiny(**SMALL).apply({}, np.zeros(shape), method=method)
