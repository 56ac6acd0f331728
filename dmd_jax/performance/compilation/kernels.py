"""What a Pallas kernel may take, of which the compiler gives no estimate."""

from __future__ import annotations

import re
from typing import NamedTuple

from dmd_jax.performance.compilation.topology import Chip

_FORWARD, _BACKWARD = "splash_mha_fwd", "splash_mha_dkv"


class Kernel(NamedTuple):
    """A call of the attention kernel."""

    name: str
    query: tuple[int, ...]  # [B, H, K, L]
    keys: int


def kernel_of(name: str, operands: str) -> Kernel:
    """The call of that name whose operands' shapes are these, as HLO writes them.

    Raises:
      ValueError: it is no call of the attention kernel.
    """
    known = next((known for known in (_FORWARD, _BACKWARD) if name.startswith(known)), None)
    arrays = [
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\bbf16\[([\d,]+)\]", operands)
    ]
    if known is None or len(arrays) < 3 or len(arrays[0]) != 4:
        raise ValueError(f"kernel {name} of {operands[:200]}; expected {_FORWARD} or {_BACKWARD}")
    return Kernel(known, arrays[0], arrays[1][-1])


def kernel_cycles(kernel: Kernel, chip: Chip) -> float:
    """Cycles of one call on a chip: its schedule's instructions, without any waiting."""
    batch, heads, _, queries = kernel.query
    blocks = batch * heads * queries * kernel.keys / 2**20
    forward, backward = chip.splash
    return blocks * (forward if kernel.name == _FORWARD else backward) / chip.cores
