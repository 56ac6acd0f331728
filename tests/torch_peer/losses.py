"""The losses of a step in PyTorch, after `losses` and `distillation.text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from .lpips import LPIPS
from .networks import Level, build_torch, frozen, load_params


def diffused(x: Tensor, noise: Tensor, level: Level) -> Tensor:
    """schedules.forward_diffusion."""
    alpha, sigma = (value[:, None, None, None] for value in level[:2])
    return alpha * x + sigma * noise


def matching_gradient(
    x: Tensor, real: Tensor, fake: Tensor, level: Level, config: ConfigDict
) -> Tensor:
    """losses.distribution_matching_gradient in the config's weighting."""
    alpha, sigma = (value[:, None, None, None] for value in level[:2])
    gradient = fake - real
    if config.objective.weighting == "normalized":
        gradient = gradient / (real - x).abs().mean(dim=(1, 2, 3), keepdim=True)
        gradient = gradient * alpha if config.objective.alpha_factor else gradient
    elif config.objective.weighting == "sigma_over_alpha":
        gradient = alpha / sigma * gradient
    else:
        gradient = alpha * sigma * gradient
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """losses.distribution_matching_loss."""
    return 0.5 * (x - x.detach() + gradient).square().mean()


def denoising_loss(denoised: Tensor, x0: Tensor, level: Level, sigma_data: float | None) -> Tensor:
    """The mean of losses.denoising_loss: weighted as EDM does, or as the noise's MSE for None."""
    alpha, sigma, _ = level
    weight = (alpha / sigma).square()
    if sigma_data is not None:
        weight = 1 / sigma.square() + 1 / sigma_data**2
    return (weight * (denoised - x0).square().mean(dim=(1, 2, 3))).mean()


class Distance(nn.Module):
    """The regression's distance of samples, (x, y) -> [B]: LPIPS of images, or L2.

    Args:
      params: the frozen parameters of our step, host arrays; L2 where LPIPS is not among them.
    """

    def __init__(self, config: ConfigDict, params: Mapping[str, Any], device: torch.device):
        super().__init__()
        self.lpips = self.decoder = None
        if "lpips" not in params:
            return
        options = dict(pooling=config.lpips.pooling, resolution=config.lpips.resolution or None)
        self.lpips = frozen(load_params(LPIPS(**options), params["lpips"]), device)
        if "decoders" in params:
            name = config.teacher.decoder
            decoder = build_torch(config.teacher[name].to_dict())
            self.decoder = frozen(load_params(decoder, params["decoders"][name]), device)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.lpips is None:
            return (x - y).square().mean(dim=(1, 2, 3))
        images = (self._image(samples) for samples in (x, y))
        return self.lpips(*images)

    def _image(self, samples: Tensor) -> Tensor:
        if self.decoder is not None:
            return decoded(self.decoder, samples)
        return samples.expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples


def decoded(decoder: nn.Module, latents: Tensor) -> Tensor:
    """The images of a diffusion model's latents, about in [-1, 1]."""
    shift = getattr(decoder.config, "shift_factor", None) or 0.0
    z = latents / decoder.config.scaling_factor + shift
    return decoder.decode(z, return_dict=False)[0].float()
