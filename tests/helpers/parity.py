"""Small configs, and the random numbers of our step as those of its peer."""

from __future__ import annotations

import flax.traverse_util
import jax
import numpy as np
from commands import ROOT, TINY
from diffusers_folder import TAESD, TEXT, UNET
from edm_pickle import drawn

from dmd_jax.config import load_config
from dmd_jax.convert.torch_layout import from_torch, to_torch, torch_key, torch_shape
from dmd_jax.method.randomness import Role, role_key
from dmd_jax.models import build_denoiser
from dmd_jax.objectives import draw

SONGUNET = dict(
    name="songunet",
    img_resolution=8,
    in_channels=1,
    out_channels=1,
    label_dim=10,
    augment_dim=9,
    model_channels=16,
    channel_mult=(1, 2),
    num_blocks=0,
    attn_resolutions=(4,),
)
DHARIWAL = dict(
    name="dhariwal",
    img_resolution=8,
    in_channels=3,
    out_channels=3,
    label_dim=5,
    augment_dim=9,
    model_channels=64,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
)


def edm_config(**values):
    """The tiny config with a U-Net that has every kind of block."""
    config = load_config(str(TINY), [])
    config.network = SONGUNET
    return _with(config, values)


def text_config(**values):
    """Text to image with networks of a few thousand parameters, and with LPIPS by TAESD."""
    config = load_config(str(ROOT / "configs" / "sd15_tiny.py"), [])
    config.network = dict(name="unet2d_condition", **UNET)
    config.teacher.text_encoder = dict(name="clip_text", **TEXT)
    config.teacher.taesd = dict(name="autoencoder_tiny", **TAESD)
    config.lpips.resolution = 16
    return _with(config, values)


def _with(config, values):
    for optimizer in config.optimizer.values():
        optimizer.update(warmup_steps=0, learning_rate=1e-4)
    config.update(values)
    return config


def drawn_weights(abstract):
    """In place of random_weights: weights with which every layer matters (edm_pickle.drawn)."""

    def make(path, leaf):
        name = "params/" + jax.tree_util.keystr(path, simple=True, separator="/")
        array = drawn(torch_key(name), torch_shape(name, leaf.shape))
        return jax.device_put(from_torch(name, array), leaf.sharding)

    return jax.tree_util.tree_map_with_path(make, abstract)


def in_torch(params) -> dict[str, np.ndarray]:
    """A tree of ours by PyTorch's names and in its layouts."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
    return {torch_key(path): to_torch(path, leaf) for path, leaf in flat.items()}


def draws_of(config, key, step: int):
    """What make_train_step draws, as torch_step.Draws."""
    import torch
    from torch_peer.step import Draws

    denoiser = build_denoiser(config.network.to_dict())
    shape, schedule = denoiser.sample_shape, denoiser.schedule
    fresh = (
        config.batch_size
        - config.objective.match_reference * config.objective.regression_batch_size
    )

    def nchw(array):
        return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)

    def levels_and_noise(role, **ends):
        whole = (config.batch_size, *shape)
        draws = draw(role_key(key, step, role), whole, schedule=schedule, **ends)
        index = np.searchsorted(np.asarray(schedule.sigmas), np.asarray(draws.level.sigma))
        return torch.tensor(index), nchw(draws.noise)

    label = None
    if denoiser.num_classes:
        labels_key = role_key(key, step, Role.LABELS)
        label = jax.random.randint(labels_key, (fresh,), 0, denoiser.num_classes)
        label = torch.tensor(np.asarray(label)).long()
    return Draws(
        z=nchw(jax.random.normal(role_key(key, step, Role.LATENTS), (fresh, *shape))),
        label=label,
        matching=levels_and_noise(
            Role.MATCHING,
            min_index=config.objective.min_index,
            max_index=config.objective.max_index,
        ),
        fake=levels_and_noise(Role.FAKE_SCORE),
    )
