"""LPIPS in PyTorch, after models.judges.lpips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd_jax.models.judges.lpips import BLOCKS

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LPIPS(nn.Module):
    """(x, y) NCHW in [-1, 1] -> [B]; the options are those of models.judges.lpips.lpips."""

    def __init__(self, *, pooling: str, resolution: int | None):
        super().__init__()
        self.pool = {"average": F.avg_pool2d, "max": F.max_pool2d}[pooling]
        self.resolution = resolution
        self.vgg16, self.heads, inputs = nn.ModuleDict(), nn.ParameterDict(), 3
        for block, (width, count) in enumerate(BLOCKS, 1):
            convolutions = self.vgg16[f"conv{block}"] = nn.ModuleDict()
            for number in range(1, count + 1):
                convolutions[str(number)] = nn.Conv2d(inputs, width, 3, padding=1)
                inputs = width
            self.heads[f"block{block}"] = nn.Parameter(torch.ones(width))
        mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = 0.0
        for block, (a, b) in enumerate(zip(self._blocks(x), self._blocks(y)), 1):
            difference = (_unit_length(a) - _unit_length(b)).square()
            head = self.heads[f"block{block}"][:, None, None]
            total = total + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return total

    def _blocks(self, images: Tensor) -> list[Tensor]:
        if self.resolution is not None:
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        x, outputs = (images - self.mean) / self.std, []
        for block, convolutions in enumerate(self.vgg16.values()):
            x = self.pool(x, 2) if block else x
            for convolution in convolutions.values():
                x = F.relu(convolution(x))
            outputs.append(x)
        return outputs


def _unit_length(x: Tensor) -> Tensor:
    x = x.float()
    squared = x.square().sum(dim=1, keepdim=True)
    # The square root's slope at zero is infinite: there the norm is a constant instead.
    zero = squared == 0
    return x / (squared.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0) + 1e-10)
