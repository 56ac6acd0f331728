"""What devices could do at best, by their makers' data sheets."""

from __future__ import annotations

import re

from dmd_jax.performance.compilation.topology import CHIPS

# bfloat16 operations a second, dense, of what JAX counts as one device: for TPU v2 and v3 that is
# one of a chip's two cores.
_TPU = {"TPU v2": 22.5e12, "TPU v3": 61.5e12} | {
    kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.kinds
}
# By the words that the device's name has among others; the first row that fits.
_GPU = (
    (("B200",), 2250e12),
    (("H200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("RTX", "4090"), 165e12),
    (("RTX", "3090"), 71e12),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations a second of a device of this kind; None where it is not in the tables.

    A computation in float32 is held to the same figure, as model FLOPs utilisation is by custom.
    """
    if device_kind in _TPU:
        return _TPU[device_kind]
    words = set(re.split(r"[ -]", device_kind))
    return next((peak for names, peak in _GPU if words.issuperset(names)), None)
