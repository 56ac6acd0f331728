"""Heads: small networks that tell real from fake by the features of another network.

DMD2's (arXiv 2405.14867, section 4.3) is for 8x8 bottlenecks: halved once, then one convolution
over all that is left. The same rule gives the heads of other sizes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.precision import at_own_precision
from dmd_jax.models.ops.layers import GroupNorm, conv, dense

_GROUPS, _EPSILON = 32, 1e-5
_FEWEST = 8  # channels of a group where the authors' 32 groups would have one or none
_LARGEST = 4  # height or width that one convolution takes up whole
# As PyTorch draws the weights of its layers: uniform on +-1/sqrt(fan_in). Biases start at zero.
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Head(nn.Module):
    """Features -> one logit an example, ln(real / fake) once it is trained; in float32.

    Feature maps are halved by 4x4 convolutions of stride 2 until they are at most 4x4, then taken
    up whole by one convolution, each with GroupNorm and SiLU after it; vectors go through a linear
    layer with SiLU. One linear layer makes the logit. All have the features' channels.
    """

    precision: str = "highest"  # of float32 products, see dmd_jax.method.precision

    @nn.compact
    @at_own_precision
    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, h, w, C] or [B, C] -> float32 [B].

        Raises:
          UserError: features of another rank.
        """
        h = features.astype(jnp.float32)
        channels = h.shape[-1]
        if h.ndim == 2:
            h = nn.silu(dense(channels, name="hidden", init=_INIT)(h))
        elif h.ndim == 4:
            h = self._to_one_pixel(h, channels)
        else:
            raise UserError(f"features have shape {h.shape}; expected [B, h, w, C] or [B, C]")
        return dense(1, name="logit", init=_INIT)(h)[:, 0]

    def _to_one_pixel(self, h: jax.Array, channels: int) -> jax.Array:
        """[B, h, w, C] -> [B, C]."""
        groups, index = _groups(channels), 0

        def block(h: jax.Array, size: int | tuple[int, int], name: str, **options) -> jax.Array:
            layer = conv(
                channels, size, name=f"{name}_conv", dtype=jnp.float32, init=_INIT, **options
            )
            return nn.silu(GroupNorm(_EPSILON, groups, name=f"{name}_norm")(layer(h)))

        while max(h.shape[1:3]) > _LARGEST and min(h.shape[1:3]) > 1:
            h = block(h, 4, f"down{index}", strides=2, padding=1)
            index += 1
        return block(h, h.shape[1:3], "whole", padding=0)[:, 0, 0]


def _groups(channels: int) -> int:
    """Of the norms. The last one's groups have a value a channel: of one alone, nothing is left."""
    if channels >= 2 * _GROUPS and channels % _GROUPS == 0:
        return _GROUPS
    return max(
        groups
        for groups in range(1, _GROUPS + 1)
        if channels % groups == 0 and channels // groups >= min(_FEWEST, channels)
    )
