"""What is float32 in Stable Diffusion's U-Net in bfloat16 too, against NumPy and PyTorch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_weights import drawn_params, params_of

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
WIDE = UNET | {
    "block_out_channels": [320],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
}
# Modules through which a level's stream goes.
STREAM = ("resnets_0", "attentions_0", "proj_out", "downsamplers_0", "upsamplers_0")


NAMES = ("conv_in", "conv_norm_out", "conv_shortcut", *STREAM)


def compiled(function, *args):
    """What the function returns, with each rounding that it asks for."""
    # XLA would otherwise leave out the rounding of what a fused layer takes.
    options = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)(*args)


def bfloat16_values(tree):
    """Float32 arrays, rounded to bfloat16."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), tree)


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

    return compiled(function, params, inputs)


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
    return params, inputs, *run(network, params, inputs, NAMES)


def test_stable_diffusions_prediction_is_not_rounded(unet):
    """To 1e-5 of the largest, where bfloat16 has 2e-3: times 15, that is the error of x0."""
    params, _, output, noted = unet
    x = noted["conv_norm_out"][0]
    assert x.dtype == output.dtype == jnp.float32
    h = normalised(np.asarray(x, np.float64), params["conv_norm_out"], 4, 1e-5)
    expected = convolved(h, params["conv_out"])
    largest = np.abs(expected).max()
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * largest)
    rounded = np.asarray(jnp.asarray(h).astype(jnp.bfloat16), np.float64)
    assert np.abs(convolved(rounded, params["conv_out"]) - expected).max() > 5e-4 * largest


def test_what_the_first_layer_makes_of_x_t_is_not_rounded(unet):
    params, inputs, _, noted = unet
    expected = convolved(inputs[0].astype(np.float64), params["conv_in"])
    result = noted["conv_in"][1]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_residual_stream_is_float32(unet):
    """Before and behind each of these modules; the short-cut's product of it to 1e-6 too."""
    params, _, _, noted = unet
    streams = [array for name in STREAM for array in noted[name]]
    assert len(streams) == 2 * len(STREAM) and {x.dtype for x in streams} == {jnp.dtype("float32")}
    x, result = (np.asarray(array, np.float64) for array in noted["conv_shortcut"])
    layer = params["up_blocks_1"]["resnets_1"]["conv_shortcut"]
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    expected = x @ kernel[0, 0] + bias
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.torch
def test_the_error_of_x0_at_the_last_step_is_half_of_a_network_wholly_in_bfloat16():
    """By PyTorch's float32 as the truth, at Stable Diffusion's width and PyTorch's first weights.

    At t = 999 x0 = (x_t - sigma noise) / alpha, with an alpha of 0.0683: the root mean square of
    its error is 0.057 wholly in bfloat16, and 0.022 here.
    """
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**{key: WIDE[key] for key in WIDE if key != "name"}).eval()
    network = build_network(WIDE, dtype="bfloat16")
    params = params_of(theirs, network)
    rng = np.random.default_rng(1)
    x_t, context = (rng.standard_normal(shape, "f4") for shape in ((2, 8, 8, 4), (2, 77, 32)))
    with torch.no_grad():
        inputs = torch.from_numpy(x_t).permute(0, 3, 1, 2), 999, torch.from_numpy(context)
        truth = theirs(*inputs).sample.permute(0, 2, 3, 1).numpy()
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    alpha2 = float(DDPMScheduler(**schedule).alphas_cumprod[999])
    assert alpha2**0.5 == pytest.approx(0.0683, abs=1e-4)

    def error(params, x_t, rounded=()):
        def noted(call, args, options, context):
            result = call(*args, **options)
            return result.astype(jnp.bfloat16) if context.module.name in rounded else result

        def function(params, *inputs):
            with nn.intercept_methods(noted):
                return network.apply({"params": params}, *inputs)

        found = compiled(function, params, x_t, np.full(2, 999, "f4"), context)
        difference = np.asarray(found, np.float64) - truth
        return (1 / alpha2 - 1) ** 0.5 * np.sqrt(np.mean(np.square(difference)))

    # Blocks hand on the dtype that they are given: with these layers in bfloat16, all is.
    layers = ("conv_in", "conv_norm_out", "conv_out")
    of_layers = bfloat16_values({name: params[name] for name in layers})
    before = error(params | of_layers, bfloat16_values(x_t), layers)
    assert 0.05 < before < 0.065
    assert error(params, x_t) <= 0.5 * before
