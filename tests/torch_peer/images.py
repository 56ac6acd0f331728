"""The one-step generator in PyTorch, from latents and tokens or labels on the host to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from dmd_jax.models import build_denoiser, complete

from .losses import decoded
from .networks import (
    Denoiser,
    Schedule,
    autocast,
    build_torch,
    frozen,
    load_params,
    to_nchw,
)


class TorchImages:
    """The peer of own_images.OwnImages.

    Weights that are multiplied are kept in compute_dtype, as pipelines are loaded.

    Args:
      decoder: "taesd" or "vae" where images are made of text, else None.
      params, inputs: of OwnImages, on the host.
      compiled: all networks together go through torch.compile.

    Raises:
      UserError: a network that has no peer.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Any,
        inputs: tuple[np.ndarray, dict[str, np.ndarray]],
        *,
        decoder: str | None,
        device: torch.device,
        compiled: bool = False,
    ):
        self._config, self._device, self._inputs = config, device, inputs
        network = complete(config.network.to_dict())
        self._schedule = Schedule(build_denoiser(network).schedule, device)
        self._denoiser = self._loaded(Denoiser(network), {"network": params["network"]})
        self._encoder = self._decoder = None
        if decoder is not None:
            encoder = build_torch(config.teacher.text_encoder.to_dict())
            self._encoder = self._loaded(encoder, params["text_encoder"])
            network = build_torch(config.teacher[decoder].to_dict())
            self._decoder = self._loaded(network, params["decoders"][decoder])
        self._make = torch.compile(self._images, dynamic=False) if compiled else self._images

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        """Pixels, uint8 [N, H, W, C]."""
        latents, tokens = self._inputs
        z, cond = to_nchw(latents, self._device), None
        for rows in tokens.values():  # one at most
            cond = torch.tensor(rows, device=self._device).long()
        return self._make(z, cond).permute(0, 2, 3, 1).cpu().numpy()

    def _loaded(self, module: nn.Module, params: Any) -> nn.Module:
        module = frozen(load_params(module, params), self._device)
        if self._config.compute_dtype == "bfloat16":
            for layer in module.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(torch.bfloat16)
        return module

    def _images(self, z: Tensor, cond: Tensor | None) -> Tensor:
        with autocast(self._config, self._device):
            if self._encoder is not None:
                cond = self._encoder(cond).last_hidden_state.float()
            images = self._schedule.one_step(self._denoiser, z, cond)
            if self._decoder is not None:
                images = decoded(self._decoder, images)
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
