"""EDM preconditioning and the door through which a configuration becomes a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser, complete, edm_denoiser
from dmd_jax.schedules import edm_level

SIGMA = np.array([0.002, 0.5, 80.0])
MLP = {"name": "mlp", "dim": 2, "width": 8, "depth": 1}


def test_preconditioning_is_the_equation():
    sigma_data = 0.7

    def apply(params, x, c_noise, labels):
        assert labels is None
        return (params * x + c_noise[:, None]).astype(jnp.bfloat16)

    denoise = edm_denoiser(apply, sigma_data=sigma_data)
    x = np.random.default_rng(0).standard_normal((3, 4)) * SIGMA[:, None]
    actual = denoise(2.0, jnp.asarray(x, jnp.float32), edm_level(SIGMA), None)

    sigma, total = SIGMA[:, None], SIGMA[:, None] ** 2 + sigma_data**2
    raw = 2 * x / np.sqrt(total) + np.log(sigma) / 4
    expected = sigma_data**2 / total * x + sigma * sigma_data / np.sqrt(total) * raw
    assert actual.dtype == jnp.float32
    # Only the network's own output is rounded to bfloat16 (8 bits), never the skip connection.
    bound = 2**-8 * np.abs(sigma * sigma_data / np.sqrt(total) * raw) + 1e-6 * np.abs(x)
    assert np.all(np.abs(actual - expected) <= bound)


def test_labels_are_one_hot_and_none_is_zeros():
    def apply(params, x, c_noise, labels):
        return labels

    denoise = edm_denoiser(apply, label_dim=3)
    x, level = jnp.zeros((2, 3)), edm_level(jnp.array([0.5, 0.5]))
    c_out = 0.5 * 0.5 / 0.5**0.5
    labelled = denoise(None, x, level, jnp.array([2, 0]))
    np.testing.assert_allclose(labelled, [[0, 0, c_out], [c_out, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(denoise(None, x, level, None), np.zeros((2, 3)))


def test_labels_are_ignored_by_an_unconditional_network():
    denoise = edm_denoiser(lambda params, x, c_noise, labels: x if labels is None else x[:1])
    x, level = jnp.ones((2, 3)), edm_level(jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(
        denoise(None, x, level, jnp.array([1, 2])), denoise(None, x, level, None)
    )


def test_a_network_of_another_output_shape_is_refused():
    denoise = edm_denoiser(lambda params, x, c_noise, labels: x[..., :1])
    with pytest.raises(UserError, match=r"shape \(2, 1\); expected x_t's, \(2, 3\)"):
        denoise(None, jnp.ones((2, 3)), edm_level(jnp.ones(2)), None)


def test_a_built_denoiser_says_what_it_denoises():
    network = {"name": "songunet", "img_resolution": 8, "in_channels": 1, "out_channels": 1}
    network |= {"label_dim": 10, "channel_mult": [1, 2]}
    denoiser = build_denoiser(network)
    assert (denoiser.sample_shape, denoiser.num_classes) == ((8, 8, 1), 10)
    mixture = build_denoiser({"name": "gaussian_mixture", "means": [[0.0, 1.0]], "stds": [1.0]})
    assert (mixture.sample_shape, mixture.num_classes) == ((2,), 0)


def test_sigma_data_is_an_option():
    denoiser = build_denoiser(MLP | {"sigma_data": 2.0, "zero_init": True})
    x = jnp.ones((3, 2))
    actual = denoiser.denoise(denoiser.init(jax.random.key(0)), x, edm_level(SIGMA), None)
    np.testing.assert_allclose(actual[:, 0], 4 / (4 + SIGMA**2), rtol=1e-6)


def test_complete_makes_mappings_of_one_network_equal():
    full = {"name": "mlp", "dim": 2, "label_dim": 0, "width": 8, "depth": 1}
    full |= {"embedding_type": "positional", "embedding_features": 64, "fourier_scale": 1.0}
    full |= {"zero_init": False, "sigma_data": 0.5}
    assert complete(MLP) == complete(complete(MLP)) == full
    assert complete(MLP | {"sigma_data": 1}) != full
    unet = {"name": "dhariwal", "img_resolution": 64, "in_channels": 3, "out_channels": 3}
    spelled = unet | {"channel_mult": (1, 2, 3, 4), "attn_resolutions": [32, 16, 8]}
    assert complete(unet) == complete(spelled) and complete(unet)["channel_mult"] == [1, 2, 3, 4]
    assert list(complete(unet))[:2] == ["name", "img_resolution"]
    mixture = {"name": "gaussian_mixture", "means": [[0.0]], "stds": [1.0]}
    assert complete(mixture) == mixture | {"weights": None}
    with pytest.raises(UserError, match="no option 'wdith'"):
        complete(MLP | {"wdith": 4})


@pytest.mark.parametrize(
    "network, dtype, message",
    [
        ({"name": "unet"}, "float32", "'unet'; expected one of songunet, dhariwal, mlp"),
        ({}, "float32", "network name is None"),
        ({"name": ["mlp"]}, "float32", r"network name is \['mlp'\]"),
        (MLP | {"wdith": 4}, "float32", r"no option 'wdith'; expected some of dim, .*width"),
        (MLP | {"dtype": "float32"}, "float32", "no option 'dtype'"),
        ({"name": "mlp"}, "float32", "mlp lacks the option dim"),
        (MLP, "float8", "dtype is 'float8'; expected one of float32, bfloat16"),
        (MLP | {"embedding_type": "rope"}, "float32", "embedding_type is 'rope'"),
        (MLP | {"embedding_features": 7}, "float32", "embedding_features is 7"),
    ],
)
def test_bad_networks_are_refused(network, dtype, message):
    with pytest.raises(UserError, match=message):
        build_denoiser(network, dtype=dtype)
