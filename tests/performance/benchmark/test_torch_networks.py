"""Each network of the peer is ours, from the same weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from diffusers_folder import VAE
from parity import DHARIWAL, SONGUNET, drawn_weights, text_config
from torch_weights import relative_error

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import edm_level
from dmd_jax.models import abstract_params, build_denoiser
from dmd_jax.models.judges.lpips import lpips, lpips_template
from dmd_jax.parallel.sharding import make_mesh, replicated, with_shardings
from dmd_jax.performance.benchmark import own_images

pytestmark = pytest.mark.torch

TOLERANCE = 2e-5  # of the output's largest magnitude
CPU = "cpu"


def drawn(shapes):
    whole = replicated(make_mesh(devices=jax.devices()[:1]))
    return drawn_weights(with_shardings(shapes, jax.tree.map(lambda _: whole, shapes)))


@pytest.mark.parametrize(
    "network",
    [
        SONGUNET | {"num_blocks": 1},
        SONGUNET | {"resample_filter": (1, 3, 3, 1), "label_dim": 0, "augment_dim": 0},
        DHARIWAL,
    ],
    ids=["songunet", "songunet-filter", "dhariwal"],
)
def test_denoisers(network):
    import torch
    from torch_peer.networks import Denoiser, load_params, to_nchw

    from dmd_jax.models import complete

    params = drawn(abstract_params(network))
    ours = build_denoiser(network)
    rng = np.random.default_rng(0)
    x_t = rng.standard_normal((4, *ours.sample_shape), np.float32)
    labels = rng.integers(0, max(ours.num_classes, 1), 4, np.int32)
    level = edm_level(np.array([0.01, 0.5, 5.0, 80.0]))
    expected = jax.jit(ours.denoise)(params, x_t, level, labels)
    module = load_params(Denoiser(complete(network)), {"network": jax.device_get(params)})
    with torch.no_grad():
        found = module(
            to_nchw(x_t, torch.device(CPU)),
            tuple(torch.tensor(np.asarray(value)) for value in level),
            torch.tensor(labels).long(),
        )
    found = found.permute(0, 2, 3, 1).numpy()
    # Each example by itself: a small sigma is all skip connection, a large one all network.
    for one, other in zip(found, expected):
        assert relative_error(one, other) < TOLERANCE


@pytest.mark.parametrize(("pooling", "resolution"), [("average", None), ("max", 20)])
def test_lpips(pooling, resolution):
    import torch
    from torch_peer.lpips import LPIPS
    from torch_peer.networks import load_params, to_nchw

    params = drawn(lpips_template())
    x, y = np.random.default_rng(0).uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32)
    expected = lpips(params, x, y, pooling=pooling, resolution=resolution)
    module = LPIPS(pooling=pooling, resolution=resolution)
    load_params(module, jax.device_get(params))
    with torch.no_grad():
        found = module(*(to_nchw(images, torch.device(CPU)) for images in (x, y)))
    assert relative_error(found.numpy(), expected) < TOLERANCE


@pytest.mark.parametrize("decoder", ["taesd", "vae"])
def test_pixels_of_tokens(monkeypatch, decoder):
    import torch
    from torch_peer.images import TorchImages

    monkeypatch.setattr(own_images, "random_weights", drawn_weights)
    config = text_config()
    config.teacher.vae = dict(name="autoencoder_kl", **VAE)
    own = own_images.OwnImages(config, count=2, decoder=decoder, devices=jax.devices()[:1])
    own.prepare()
    peer = TorchImages(config, *own.on_host(), decoder=decoder, device=torch.device(CPU))
    ours, theirs = own(), peer()
    assert ours.shape == theirs.shape == (2, 64, 64, 3) and ours.dtype == theirs.dtype == np.uint8
    assert len(np.unique(ours)) > 10
    # Truncation to bytes makes one of a difference in rounding.
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.mean(ours != theirs) < 0.01


def test_networks_without_a_peer_are_refused():
    from torch_peer.networks import build_torch

    with pytest.raises(UserError, match="network mlp has no peer in PyTorch; expected one of"):
        build_torch({"name": "mlp", "dim": 2})
    with pytest.raises(UserError, match="encoder_type is 'residual'; expected 'standard'"):
        build_torch(SONGUNET | {"encoder_type": "residual"})


def test_parameters_that_do_not_fit_are_refused():
    from torch_peer.networks import build_torch, load_params

    params = jax.device_get(drawn(abstract_params(SONGUNET)))
    del params["map_layer0"]["bias"]
    with pytest.raises(ValueError, match=r"missing \['map_layer0.bias'\], unexpected \[\]"):
        load_params(build_torch(SONGUNET), params)
