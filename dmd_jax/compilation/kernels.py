"""What a Pallas kernel may take, of which the compiler gives no estimate."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from dmd_jax.compilation.topology import Chip

# Matrix products over all queries and keys: q k^T and p v; of the backward pass also dv, dp, dq
# and dk, where q k^T is made again.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
# Instructions of the kernel's schedule over those that its matrix products fill: the TPU compiler's
# own count for blocks of 1024, v5e, head channels 40. They are 6,091 where 4,096 would do forward,
# and 10,466 where 10,240 would backward.
_OVERHEAD = {"splash_mha_fwd": 1.49, "splash_mha_dkv": 1.03}


class Kernel(NamedTuple):
    """A call of the attention kernel."""

    name: str
    query: tuple[int, ...]  # [B, H, L, K]
    keys: int


def kernel_of(name: str, operands: str) -> Kernel:
    """The call of that name whose operands' shapes are these, as HLO writes them.

    Raises:
      ValueError: it is no call of the attention kernel.
    """
    known = next((known for known in _PRODUCTS if name.startswith(known)), None)
    arrays = [
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\bbf16\[([\d,]+)\]", operands)
    ]
    if known is None or len(arrays) < 3 or len(arrays[0]) != 4:
        raise ValueError(f"kernel {name} of {operands[:200]}; expected one of {list(_PRODUCTS)}")
    return Kernel(known, arrays[0], arrays[1][-2])


def kernel_cycles(kernel: Kernel, chip: Chip) -> float:
    """Cycles of one call on a chip: matrix products of heads padded to the matrix unit's side."""
    batch, heads, queries, channels = kernel.query
    padded = -(-channels // chip.mxu) * chip.mxu
    products = _PRODUCTS[kernel.name] * math.prod((batch, heads, queries, kernel.keys, padded))
    a_cycle = chip.peak_flops / 2 / chip.clock
    return products / a_cycle * _OVERHEAD[kernel.name]
