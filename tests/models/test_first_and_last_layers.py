"""Stable Diffusion's first and last layer, which are float32 in bfloat16 too, against NumPy."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import drawn_params

from dmd_jax.models import build_network

UNET = {
    "name": "unet2d_condition",
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


def run(network, params, inputs, names):
    """The output, and (input, output) of the modules of these names."""
    found = {}

    def noted(call, args, options, context):
        result = call(*args, **options)
        if context.method_name == "__call__" and context.module.name in names:
            found[context.module.name] = (args[0], result)
        return result

    def function(params, inputs):
        with nn.intercept_methods(noted):
            return network.apply({"params": params}, *inputs), dict(found)

    # XLA would otherwise leave out the rounding of what a fused layer takes.
    options = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(params, inputs)


def convolved(x, layer):
    """A 3x3 convolution of [B, H, W, C] with one zero at each edge."""
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    ]
    return sum(taps) + bias


def normalised(x, layer, groups, epsilon):
    """Group normalisation of [B, H, W, C], and SiLU."""
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = (f(parts, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    parts = (parts - mean) / np.sqrt(variance + epsilon)
    scale, bias = (np.asarray(layer[name], np.float64) for name in ("scale", "bias"))
    x = parts.reshape(x.shape) * scale + bias
    return x / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def unet():
    network = build_network(UNET, dtype="bfloat16")
    params = drawn_params(network)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 8, 8, 4), np.float32), np.array([999.0, 20.0], np.float32)
    inputs += (rng.standard_normal((2, 77, 16), np.float32),)
    return params, inputs, *run(network, params, inputs, ("conv_in", "conv_norm_out"))


def test_stable_diffusions_prediction_is_not_rounded(unet):
    """To 1e-5 of the largest, where bfloat16 has 2e-3: times 15, that is the error of x0."""
    params, _, output, noted = unet
    x = noted["conv_norm_out"][0]
    assert x.dtype == jnp.bfloat16 and output.dtype == jnp.float32
    h = normalised(np.asarray(x, np.float64), params["conv_norm_out"], 4, 1e-5)
    expected = convolved(h, params["conv_out"])
    largest = np.abs(expected).max()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * largest)
    rounded = np.asarray(jnp.asarray(h).astype(jnp.bfloat16), np.float64)
    assert np.abs(convolved(rounded, params["conv_out"]) - expected).max() > 5e-4 * largest


def test_what_the_first_layer_makes_of_x_t_is_rounded_once(unet):
    params, inputs, _, noted = unet
    expected = convolved(inputs[0].astype(np.float64), params["conv_in"])
    result = noted["conv_in"][1]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
