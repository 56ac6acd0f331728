"""The parts of EDM's networks in PyTorch, after models.ops.layers: names and numbers are theirs.

Images are NCHW, in memory channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd_jax.models.ops.layers import SQRT_HALF, filter_padding


def positional_embedding(
    c_noise: Tensor, features: int, *, freq_shift: int = 1, cosines_first: bool = False
) -> Tensor:
    """[B] -> [B, features]."""
    half = features // 2
    exponents = torch.arange(half, dtype=torch.float64, device=c_noise.device)
    freqs = 10000.0 ** -(exponents / (half - freq_shift))
    angles = torch.outer(c_noise, freqs.to(torch.float32))
    waves = [angles.sin(), angles.cos()]
    return torch.cat(waves[::-1] if cosines_first else waves, dim=1)


class GroupNorm(nn.Module):
    """32 groups, or fewer where a group would have less than 4 channels."""

    def __init__(self, channels: int, epsilon: float):
        super().__init__()
        self.groups, self.epsilon = min(32, channels // 4), epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.epsilon)


class Resample(nn.Module):
    """Doubles or halves an image with a filter whose taps are not normalised."""

    def __init__(self, taps: Sequence[float], *, up: bool):
        super().__init__()
        self.up, self.box, self.padding = up, tuple(taps) == (1, 1), filter_padding(taps)
        kernel = torch.tensor(taps, dtype=torch.float32)
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2 * (4 if up else 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.box:  # each pixel four times, or the mean of four: PyTorch has both ready-made
            return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        resize = F.conv_transpose2d if self.up else F.conv2d
        return resize(x, kernel, stride=2, padding=self.padding, groups=channels)


class UNetBlock(nn.Module):
    """models.ops.layers.UNetBlock, whose fields the arguments are."""

    def __init__(
        self,
        inputs: int,
        features: int,
        emb_features: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int = 1,
        resample_filter: Sequence[float] = (1, 1),
        scale_shift: bool = False,
        sum_scale: float = SQRT_HALF,
        project_resampled: bool = True,
        epsilon: float = 1e-6,
    ):
        super().__init__()
        self.scale_shift, self.sum_scale, self.num_heads = scale_shift, sum_scale, num_heads
        self.resample = Resample(resample_filter, up=up) if up or down else nn.Identity()
        self.norm0 = GroupNorm(inputs, epsilon)
        self.conv0 = nn.Conv2d(inputs, features, 3, padding=1)
        self.affine = nn.Linear(emb_features, features * (2 if scale_shift else 1))
        self.norm1 = GroupNorm(features, epsilon)
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.skip = None
        if inputs != features or ((up or down) and project_resampled):
            self.skip = nn.Conv2d(inputs, features, 1)
        self.attends = attention
        if attention:
            self.norm2 = GroupNorm(features, epsilon)
            self.qkv = nn.Conv2d(features, 3 * features, 1)
            self.proj = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        affine = self.affine(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = affine.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + affine)
        h = self.conv1(F.silu(h))
        x = self.resample(x)
        x = ((x if self.skip is None else self.skip(x)) + h) * self.sum_scale
        if self.attends:
            x = (x + self._attention(self.norm2(x))) * self.sum_scale
        return x

    def _attention(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # The checkpoints' layout: heads outermost, q, k and v innermost.
        qkv = self.qkv(x).permute(0, 2, 3, 1)
        qkv = qkv.reshape(batch, height * width, self.num_heads, channels // self.num_heads, 3)
        q, k, v = qkv.transpose(1, 2).unbind(-1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(h.reshape(batch, height, width, channels).permute(0, 3, 1, 2))
