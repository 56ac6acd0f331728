"""What the backward pass keeps of a U-Net's blocks, and what it computes again."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax import lax


def _keep_products(primitive, *operands, **params) -> bool:
    """Whether the backward pass keeps a result: of convolutions, and of matmuls with weights."""
    if primitive is lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **params)


# What is kept of each block besides its input. The attention's logits, the norms and the
# activations are computed again under "dots", all of it under "full".
_KEPT = {"full": jax.checkpoint_policies.nothing_saveable, "dots": _keep_products}
REMATS = ("none", *_KEPT)


def rematerialised(
    block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The module with the same parameters whose backward pass keeps what `remat` says.

    Args:
      block: a module without flags among the arguments of its call, but for static_argnums.
      remat: one of REMATS.
      static_argnums: the places of flags, where `self` is 0.
    """
    if remat == "none":
        return block
    return nn.remat(block, policy=_KEPT[remat], static_argnums=static_argnums)
