"""SongUNet's size, initialisation, resampling, dropout and refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import edm_level
from dmd_jax.models import build_denoiser
from dmd_jax.models.edm.songunet import SongUNet
from dmd_jax.models.ops.layers import FourierEmbedding, GroupNorm, UNetBlock, downsample, upsample

CIFAR = {
    "name": "songunet",
    "img_resolution": 32,
    "in_channels": 3,
    "out_channels": 3,
    "augment_dim": 9,
    "channel_mult": [2, 2, 2],
}
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}


@pytest.mark.parametrize(
    "options, released, freqs",
    [
        ({"label_dim": 10}, 55_735_299, 0),
        ({}, 55_733_891, 0),
        # The reference holds the Fourier frequencies as a buffer, not a parameter.
        (NCSNPP, 56_397_827, 128),
    ],
)
def test_parameter_count_of_the_cifar10_networks(options, released, freqs):
    shapes = jax.eval_shape(build_denoiser(CIFAR | options).init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == released + freqs


def test_initialisation_has_edm_bounds():
    block = UNetBlock(32, attention=True, down=True)
    x, emb = jnp.zeros((1, 4, 4, 16)), jnp.zeros((1, 64))
    init = jax.jit(lambda key: block.init(key, x, emb, deterministic=True)["params"])
    params = init(jax.random.key(0))
    gains = {"conv0": 1, "conv1": 1e-5, "skip": 1, "affine": 1, "qkv": 0.2**0.5, "proj": 1e-5}
    fans = {
        "conv0": 9 * (16 + 32),
        "conv1": 9 * (32 + 32),
        "skip": 16 + 32,
        "affine": 64 + 32,
        "qkv": 32 + 96,
        "proj": 32 + 32,
    }
    for name, gain in gains.items():
        bound = gain * math.sqrt(6 / fans[name])
        largest = np.abs(params[name]["kernel"]).max()
        assert 0.97 * bound < largest <= bound * (1 + 1e-6), name
        assert not np.any(params[name]["bias"]), name


def test_fourier_frequencies_are_wide_and_get_no_gradient():
    module = FourierEmbedding(4096)
    c_noise = jnp.array([0.3, -1.0])
    params = module.init(jax.random.key(0), c_noise)
    freqs = params["params"]["freqs"]
    assert abs(float(jnp.std(freqs)) / 16 - 1) < 0.05
    grad = jax.grad(lambda p: jnp.sum(module.apply(p, c_noise) ** 3))(params)
    assert not np.any(grad["params"]["freqs"])


def test_box_filter_averages_and_repeats():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    blocks = np.asarray(x).reshape(1, 2, 2, 2, 2, 2)
    np.testing.assert_allclose(downsample(x, (1, 1)), blocks.mean(axis=(2, 4)))
    np.testing.assert_allclose(upsample(x, (1, 1)), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


def test_wide_filter_by_hand():
    row = jnp.array([8.0, 16.0, 24.0, 32.0])
    x = jnp.broadcast_to(row[None, None, :, None], (1, 4, 4, 1))
    # [1, 3, 3, 1] / 8 on 0 8 16 24 32 0; the other axis loses 1/8 at its ends.
    np.testing.assert_allclose(downsample(x, (1, 3, 3, 1))[0, 0, :, 0] * 8 / 7, [12.0, 23.0])
    # An impulse is spread with weights 2 [1, 3, 3, 1] / 8 on each axis.
    impulse = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(16.0)
    spread = upsample(impulse, (1, 3, 3, 1))[0, :, :, 0]
    taps = [0, 1, 3, 3, 1, 0]
    np.testing.assert_allclose(spread, np.outer(taps, taps), atol=1e-6)


def test_group_norm_keeps_its_precision_far_from_zero():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    variables = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    norm = GroupNorm().apply
    np.testing.assert_allclose(norm(variables, x + 1000), norm(variables, x), atol=5e-4)


def test_dropout_needs_a_key_and_is_off_without():
    network = {"name": "songunet", "img_resolution": 4, "in_channels": 1, "out_channels": 1}
    network |= {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "dropout": 0.5}
    denoiser = build_denoiser(network)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    x, level = jnp.ones((2, 4, 4, 1)), edm_level(jnp.array([1.0, 5.0]))

    @jax.jit
    def run(key):
        return denoiser.denoise(params, x, level, None, dropout_key=key)

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.abs(first - jax.jit(denoiser.denoise)(params, x, level, None)).max() > 1e-2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder_type": "skips"}, "encoder_type is 'skips'; expected one of standard, skip"),
        ({"embedding_type": "rope"}, "embedding_type is 'rope'"),
        ({"num_blocks": 10**9}, "num_blocks is 1000000000; expected 0 to 64"),
        ({"channel_mult": [2, 0]}, r"channel_mult is \(2, 0\); expected 1 to 64"),
        ({"channel_mult": []}, r"channel_mult is \(\); expected 1 to 64"),
        ({"channel_mult": [1] * 20}, "channel_mult has 20 levels; expected 1 to 16"),
        ({"resample_filter": []}, "resample_filter is .*; expected taps"),
        ({"resample_filter": [1]}, r"resample_filter is \[1\]; .* an even number up to 16"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter is \[1, 2, 1\]; .* an even number"),
        ({"resample_filter": [1] * 10**4}, "an even number up to 16"),
        ({"resample_filter": [1, math.nan]}, "resample_filter is .*; expected taps"),
        ({"resample_filter": [1, 10**400]}, "resample_filter is .*; expected taps up to 1e.06"),
        ({"resample_filter": [1, -1]}, "expected taps up to 1e.06 whose sum is positive"),
        ({"augment_dim": -1}, "augment_dim is -1; expected 0 to 1000000"),
        ({"channel_mult_noise": 0}, "channel_mult_noise is 0; expected 1 to 64"),
        ({"channel_mult_noise": -1}, "channel_mult_noise is -1; expected 1 to 64"),
        ({"model_channels": 33}, "model_channels is 33; expected an even number"),
        ({"dropout": -0.1}, "dropout is -0.1; expected 0 or more and below 1"),
        ({"dropout": 1}, "dropout is 1; expected 0 or more and below 1"),
        ({"dropout": math.nan}, "dropout is nan; expected 0 or more and below 1"),
        ({"sigma_data": math.nan}, "sigma_data is nan; expected 0.0001 to 10000.0"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0; expected 0.0001 to 10000.0"),
        ({"sigma_data": math.inf}, "sigma_data is inf; expected 0.0001 to 10000.0"),
        ({"img_resolution": 30}, "img_resolution is 30; expected a multiple of 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(CIFAR | options)


def test_bad_shapes_are_refused():
    network = SongUNet(8, 3, 3, model_channels=8, channel_mult=(1,), num_blocks=1)
    with pytest.raises(UserError, match=r"expected \[B, 8, 8, 3\]"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    narrow = SongUNet(8, 3, 3, model_channels=14, channel_mult=(1,), num_blocks=1)
    with pytest.raises(UserError, match="norm0: 14 channels do not divide into 3 groups"):
        jax.eval_shape(narrow.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
