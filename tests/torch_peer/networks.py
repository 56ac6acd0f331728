"""The networks of a config in PyTorch: diffusers' and transformers', and ours after EDM's.

Importing this needs PyTorch; a network of diffusers or transformers is imported when it is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from dmd_jax.convert.diffusers_config import KINDS
from dmd_jax.convert.torch_layout import to_torch, torch_key
from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import build_network, complete

from .edm import DhariwalUNet, SongUNet

# Noise levels of a batch: alpha, sigma and time, [B] each.
Level = tuple[Tensor, Tensor, Tensor]
_OURS = {"songunet": SongUNet, "dhariwal": DhariwalUNet}
_THEIRS = {
    "unet2d_condition": "UNet2DConditionModel",
    "autoencoder_kl": "AutoencoderKL",
    "autoencoder_tiny": "AutoencoderTiny",
}


def build_torch(network: Mapping[str, Any]) -> nn.Module:
    """The network that a mapping describes (see models.build_network), in evaluation mode.

    Raises:
      UserError: a network that has no peer in PyTorch.
    """
    network = complete(network)
    name = network["name"]
    if name in _OURS:
        module = _OURS[name](network)
    elif name in _THEIRS:
        import diffusers

        options = _fields(network) | KINDS[_THEIRS[name]].neutral
        module = getattr(diffusers, _THEIRS[name])(**options)
    elif name == "clip_text":
        import transformers

        module = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_fields(network)))
    else:
        peers = ", ".join([*_OURS, *_THEIRS, "clip_text"])
        raise UserError(f"network {name} has no peer in PyTorch; expected one of {peers}")
    return module.eval()


def load_params(module: nn.Module, params: Any) -> nn.Module:
    """The module with parameters of ours, a nested dict of host arrays; all keys must agree."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    state = {
        torch_key(path): torch.from_numpy(np.array(to_torch(path, leaf)))
        for path, leaf in flat.items()
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    # Buffers such as CLIP's position ids are no parameters.
    missing = set(missing) & {key for key, _ in module.named_parameters()}
    if missing or unexpected:
        raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    return module


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, channels-last, with no gradient of its parameters."""
    return module.to(device, memory_format=torch.channels_last).requires_grad_(False)


def autocast(config: ConfigDict, device: torch.device) -> torch.autocast:
    """The context in which networks compute in the config's compute_dtype."""
    enabled = config.compute_dtype == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def to_nchw(images: Any, device: torch.device) -> Tensor:
    """Host images [N, H, W, C] as NCHW on the device, channels-last in memory."""
    return torch.tensor(np.asarray(images), device=device).permute(0, 3, 1, 2)


def _fields(network: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the network's own, not its denoiser's."""
    fields = {field.name for field in dataclasses.fields(build_network(network))}
    return {key: value for key, value in network.items() if key in fields - {"name"}}


class Denoiser(nn.Module):
    """A network that predicts the clean image: (x_t, level, cond) -> x0, float32 NCHW.

    Args:
      network: complete. The preconditioning is that of denoisers.
    """

    def __init__(self, network: Mapping[str, Any]):
        super().__init__()
        self.network = build_torch(network)
        self.label_dim = network.get("label_dim", 0)
        self.sigma_data = network.get("sigma_data")
        self.prediction_type = network.get("prediction_type")

    def forward(self, x_t: Tensor, level: Level, cond: Tensor | None) -> Tensor:
        alpha, sigma = (value[:, None, None, None] for value in level[:2])
        if self.sigma_data is None:
            raw = self.network(x_t, level[2], cond, return_dict=False)[0].float()
            if self.prediction_type == "epsilon":
                return (x_t - sigma * raw) / alpha
            return alpha * x_t - sigma * raw if self.prediction_type == "v_prediction" else raw
        variance = sigma**2 + self.sigma_data**2
        labels = None
        if self.label_dim:
            labels = nn.functional.one_hot(cond, self.label_dim).float()
        raw = self.network(x_t * variance.rsqrt(), level[1].log() / 4, labels).float()
        c_skip = self.sigma_data**2 / variance
        return c_skip * x_t + sigma * self.sigma_data * variance.rsqrt() * raw


class Schedule:
    """A NoiseSchedule on a PyTorch device."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device):
        arrays = (schedule.alphas, schedule.sigmas, schedule.times)
        self._arrays = [torch.tensor(np.asarray(array), device=device) for array in arrays]
        self.prior_scale, self.num_levels = schedule.prior_scale, schedule.num_levels

    def level(self, index: Tensor) -> Level:
        return tuple(array[index] for array in self._arrays)

    def one_step(self, denoise: Callable[..., Tensor], z: Tensor, cond: Any) -> Tensor:
        """The generator: the denoiser held at the last level."""
        last = torch.full(z.shape[:1], self.num_levels - 1, device=z.device)
        return denoise(self.prior_scale * z, self.level(last), cond)
