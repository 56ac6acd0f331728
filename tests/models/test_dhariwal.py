"""DhariwalUNet's size, heads, initialisation and refusals; its numbers are in test_edm_parity."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.config import load_config, shipped_config
from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser
from dmd_jax.models.edm.dhariwal import DhariwalUNet
from dmd_jax.models.ops.layers import UNetBlock

SMALL = {"name": "dhariwal", "img_resolution": 8, "in_channels": 1, "out_channels": 1}
SMALL |= {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


@pytest.mark.parametrize(
    "config, released",
    [
        ("cifar10_cond", 55_735_299),
        ("cifar10_uncond", 55_733_891),
        ("imagenet64", 295_899_267),
    ],
)
def test_parameter_counts_of_the_shipped_configs(config, released):
    network = load_config(str(shipped_config(config)), []).network.to_dict()
    shapes = jax.eval_shape(build_denoiser(network).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == released


def test_attention_of_several_heads():
    """qkv's channels are (head, channel, q/k/v), written out in NumPy in float64."""
    heads, width, size = 3, 4, 2
    channels = heads * width
    block = UNetBlock(channels, attention=True, num_heads=heads, sum_scale=1.0)
    rng = np.random.default_rng(0)
    x, emb = rng.standard_normal((2, size, size, channels), np.float32), jnp.zeros((2, 8))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, emb, deterministic=True)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    params = params["params"]
    params["conv1"] = jax.tree.map(np.zeros_like, params["conv1"])  # leaves x + attention
    actual = block.apply({"params": params}, x, emb, deterministic=True)

    x = x.astype(np.float64)
    groups = x.reshape(2, size * size, 3, 4)  # at least 4 channels in a group
    mean, var = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    normed = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(2, size * size, channels)
    normed = normed * params["norm2"]["scale"] + params["norm2"]["bias"]
    qkv = normed @ params["qkv"]["kernel"][0, 0] + params["qkv"]["bias"]
    q, k, v = np.moveaxis(qkv.reshape(2, size * size, heads, width, 3), -1, 0)
    logits = np.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(width)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    h = np.einsum("bhqk,bkhc->bqhc", weights, v).reshape(2, size, size, channels)
    expected = x + h @ params["proj"]["kernel"][0, 0] + params["proj"]["bias"]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_heads_have_64_channels():
    module = DhariwalUNet(8, 1, 1, model_channels=64, channel_mult=(3,), num_blocks=0)
    seen = []

    def note(next_fn, args, kwargs, context):
        if isinstance(context.module, UNetBlock) and context.method_name == "_attention":
            seen.append(context.module.num_heads)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    assert set(seen) == {3}


def test_it_starts_as_the_skip_connection_with_edm_bounds():
    denoiser = build_denoiser(SMALL | {"label_dim": 10, "num_blocks": 0})
    params = denoiser.init(jax.random.key(0))
    block = params["dec_8x8_block0"]
    for name, fan_in in (("conv0", 9 * 128), ("affine", 256), ("skip", 128)):
        largest = np.abs(block[name]["kernel"]).max()
        assert 0.97 * fan_in**-0.5 < largest <= fan_in**-0.5 * (1 + 1e-6), name
    assert not np.any(block["conv1"]["kernel"]) and not np.any(params["out_conv"]["kernel"])
    assert abs(np.std(params["map_label"]["kernel"]) - 1) < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_channels": 32}, "attends at 8x8 with 32 channels; expected a multiple of 64"),
        (
            {"model_channels": 32, "channel_mult": [1, 2], "attn_resolutions": [8]},
            "attends at 8x8 with 32 channels",
        ),
        ({"img_resolution": 7, "channel_mult": [1, 1]}, "img_resolution is 7; expected a multiple"),
        ({"augment_dim": -1}, "DhariwalUNet augment_dim is -1; expected 0 to 1000000"),
        ({"dropout": math.nan}, "DhariwalUNet dropout is nan; expected 0 or more and below 1"),
        ({"label_dim": -1}, "label_dim is -1; expected 0 to 1000000"),
        ({"encoder_type": "standard"}, "no option 'encoder_type'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(SMALL | options)


def test_another_shape_is_refused():
    module = DhariwalUNet(8, 3, 3, model_channels=64, channel_mult=(1,), num_blocks=0)
    with pytest.raises(UserError, match=r"input has shape \(1, 8, 8, 1\); expected \[B, 8, 8, 3\]"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
