"""Stable Diffusion's autoencoder against PyTorch diffusers (see diffusers_golden.py)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_golden import LOG_VARIANCE_BIASES, VAE, drawn_input
from once import once
from torch_weights import drawn_params, params_of, relative_error

from dmd_jax.errors import UserError
from dmd_jax.models import abstract_params, build_network

TOLERANCE = 5e-5  # of the largest magnitude
SMALL = {"name": "autoencoder_kl"} | VAE
RELEASED = {
    "name": "autoencoder_kl",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
IMAGE = drawn_input("vae image", (2, 16, 24, 3))
LATENTS = drawn_input("vae latents", (2, 4, 6, 4))


@functools.cache
def autoencoder(dtype="float32"):
    """The network and its parameters, biases that drive the log-variance to its ends included."""
    network = build_network(SMALL, dtype=dtype)
    params = drawn_params(network)
    for channel, bias in LOG_VARIANCE_BIASES.items():
        params["quant_conv"]["bias"][channel] = bias
    return network, params


@functools.cache
def both_ways(dtype="float32"):
    """(mean, log_variance) of IMAGE and the image of LATENTS, of one program."""
    network, params = autoencoder(dtype)

    @once
    def run(params):
        variables = {"params": params}
        moments = network.apply(variables, IMAGE, method="encode")
        return moments, network.apply(variables, LATENTS, method="decode")

    return run(params)


def test_encode_matches_diffusers(golden):
    mean, log_variance = both_ways()[0]
    arrays = golden("diffusers")
    assert relative_error(mean, arrays["vae/mean"]) < TOLERANCE
    free, theirs = log_variance[..., 2:], arrays["vae/log_variance"][..., 2:]
    assert relative_error(free, theirs) < TOLERANCE
    for channel, end in enumerate((20, -30)):
        np.testing.assert_array_equal(log_variance[..., channel], end)
        np.testing.assert_array_equal(arrays["vae/log_variance"][..., channel], end)


def test_decode_matches_diffusers(golden):
    assert relative_error(both_ways()[1], golden("diffusers")["vae/image"]) < TOLERANCE


@pytest.mark.torch
def test_names_shapes_and_defaults_are_diffusers():
    import diffusers
    from diffusers_golden import torch_vae

    network, params = autoencoder()
    jax.tree.map(np.testing.assert_array_equal, params, params_of(torch_vae(), network))
    theirs = diffusers.AutoencoderKL(**VAE).config
    fields = {key: getattr(network, key) for key in theirs if hasattr(network, key)}
    assert len(fields) == 10
    assert fields == {
        k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if k in fields
    }


def test_bfloat16_keeps_float32_outputs_and_comes_near(golden):
    (mean, log_variance), image = both_ways("bfloat16")
    assert {mean.dtype, log_variance.dtype, image.dtype} == {jnp.dtype("float32")}
    arrays = golden("diffusers")
    assert 1e-4 < relative_error(mean, arrays["vae/mean"]) < 5e-2
    assert 1e-4 < relative_error(image, arrays["vae/image"]) < 5e-2


def test_parameter_count_of_the_released_network():
    shapes = abstract_params(RELEASED)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    network = build_network(RELEASED)
    assert (network.factor, network.scaling_factor, network.shift_factor) == (8, 0.18215, None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_out_channels": [16, 32]}, "down_block_types is .*; expected 2 of DownEncoder"),
        ({"block_out_channels": [16, 32, 44]}, "has 44; expected a multiple of norm_num_groups, 8"),
        ({"block_out_channels": []}, r"block_out_channels is \(\); expected 1 to 65536"),
        ({"block_out_channels": [8] * 17}, "has 17 levels; expected 1 to 16"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types is .*; expected 3 of UpDecoder"),
        ({"layers_per_block": 0}, "layers_per_block is 0; expected 1 to 64"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0; expected 1e-06 to"),
        ({"shift_factor": math.nan}, "shift_factor is nan; expected at most 1e6"),
        ({"shift_factor": "0"}, r"shift_factor is '0'; expected float \| None"),
        ({"latents_mean": [0.0]}, "no option 'latents_mean'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_network(SMALL | options)


def test_bad_shapes_are_refused():
    network, params = autoencoder()

    def run(method, shape):
        apply = functools.partial(network.apply, {"params": params}, method=method)
        jax.eval_shape(apply, jax.ShapeDtypeStruct(shape, jnp.float32))

    for shape in ((1, 16, 18, 3), (1, 16, 16, 4), (16, 16, 3)):
        with pytest.raises(UserError, match=r"expected \[B, H, W, 3\], H and W multiples of 4"):
            run("encode", shape)
    for shape in ((1, 4, 4, 8), (4, 4, 4)):
        with pytest.raises(UserError, match=r"latents have shape .*; expected \[B, h, w, 4\]"):
            run("decode", shape)
