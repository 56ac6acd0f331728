"""What EDM's U-Nets keep for the backward pass; the text-to-image U-Net has a test of its own."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from once import once

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import edm_level
from dmd_jax.models import build_denoiser
from dmd_jax.models.edm.dhariwal import DhariwalUNet
from dmd_jax.models.edm.songunet import SongUNet
from dmd_jax.models.stable_diffusion.unet2d_condition import UNet2DConditionModel

SIZES = {"img_resolution": 8, "in_channels": 3, "out_channels": 3}
SMALL = SIZES | {
    "label_dim": 2,
    "model_channels": 16,
    "channel_mult": [4],
    "num_blocks": 1,
    "attn_resolutions": [8],
}


@pytest.mark.parametrize("name", ["songunet", "dhariwal"])
def test_it_keeps_less_and_changes_nothing(name):
    """Gradients to 1e-5 of the largest of their leaf, dropout drawn anew from the same key."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((2, 8, 8, 3), np.float32), jnp.array([0, 1])
    level = edm_level(jnp.array([0.1, 2.0]))
    kept, gradients = {}, {}
    for remat in ("none", "full", "dots"):
        denoiser = build_denoiser(SMALL | {"name": name, "dropout": 0.5}, remat=remat)
        key = jax.random.key(1)

        def loss(params, denoiser=denoiser, key=key):
            return jnp.sum(denoiser.denoise(params, x, level, labels, dropout_key=key) * x)

        shapes = jax.eval_shape(denoiser.init, jax.random.key(0))
        draws = np.random.default_rng(1)
        params = jax.tree.map(lambda p, d=draws: 0.1 * d.standard_normal(p.shape, "f4"), shapes)
        residuals = jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params))
        kept[remat] = sum(math.prod(leaf.shape) for leaf in residuals)
        if remat != "dots":
            gradients[remat] = once(jax.grad(loss))(params)
    assert kept["full"] < kept["dots"] < kept["none"]
    for ours, plain in zip(*(jax.tree.leaves(gradients[remat]) for remat in ("full", "none"))):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="remat is 'some'; expected one of none, full, dots"):
        build_denoiser(SMALL | {"name": "songunet"}, remat="some")


@pytest.mark.parametrize("network", [SongUNet, DhariwalUNet, UNet2DConditionModel])
def test_networks_refuse_it_themselves(network):
    sizes = {} if network is UNet2DConditionModel else SIZES
    with pytest.raises(UserError, match=f"{network.__name__} remat is 'some'; expected one of no"):
        network(**sizes, remat="some")
