"""TPU slices by name, as meshes that can be compiled for where there is no TPU.

The figures of a chip are those that Google publishes (Cloud TPU documentation, "TPU versions").
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dmd_jax.errors import UserError, first_line


class Chip(NamedTuple):
    """A generation of TPU."""

    hbm_bytes: int
    peak_flops: float  # a second, bfloat16
    macs: int  # what the matrix units multiply and add in a cycle
    cores: int  # that share the rows of a kernel
    # Instructions of a core for 2^20 logits of a head of at most 128 channels, forward and
    # backward: of the compiler's schedule of the attention kernel with models.ops.splash's blocks.
    splash: tuple[int, int]
    interconnect: float  # bytes a second, over all links of a chip
    sizes: tuple[str, ...]  # of slices
    kinds: tuple[str, ...]  # what JAX calls its devices

    @property
    def clock(self) -> float:
        """Cycles a second, by the peak and what is multiplied and added in a cycle."""
        return self.peak_flops / (2 * self.macs)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
GiB = 2**30
CHIPS = {
    "v4": Chip(
        hbm_bytes=32 * GiB,
        peak_flops=275e12,
        macs=8 * 128**2,
        cores=2,
        splash=(7_749, 12_487),
        interconnect=300e9,
        sizes=_CUBES,
        kinds=("TPU v4",),
    ),
    "v5e": Chip(
        hbm_bytes=16 * GiB,
        peak_flops=197e12,
        macs=4 * 128**2,
        cores=1,
        splash=(4_818, 10_465),
        interconnect=200e9,
        sizes=_FLAT,
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        hbm_bytes=95 * GiB,
        peak_flops=459e12,
        macs=8 * 128**2,
        cores=2,
        splash=(4_767, 10_707),
        interconnect=600e9,
        sizes=_CUBES,
        kinds=("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(
        hbm_bytes=32 * GiB,
        peak_flops=918e12,
        macs=4 * 256**2,
        cores=1,
        splash=(3_610, 7_602),
        interconnect=448e9,
        sizes=_FLAT,
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
}
# What libtpu reads where it finds no TPU; without them it asks a metadata server for minutes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def chip_of(topology: str) -> Chip:
    """The generation of a slice such as "v5e:16x16".

    Raises:
      UserError: an unknown one.
    """
    generation, _, size = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise UserError(f"unknown topology {topology!r}; expected {_known()}")
    return CHIPS[generation]


def devices_of(topology: str, slices: int = 1):
    """The devices of one slice, or of several that are joined by the data centre's network.

    A device is a chip; the two cores of a v4 or v5p work as one.

    Raises:
      UserError: an unknown topology, or libtpu is not installed.
    """
    chip_of(topology)
    os.environ.update(_ENVIRONMENT)
    # The TPU plugin compiles alone; what is computed here, as the shapes' keys, is for the CPU.
    jax.config.update("jax_platforms", "cpu")
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if slices > 1:
        options["num_slices"] = slices
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler, libtpu; expected `pip install dmd_jax[tpu]`"
        )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (RuntimeError, ValueError) as error:  # jax.errors.JaxRuntimeError is the first
        raise UserError(
            f"no topology {topology!r} ({first_line(error)}); expected {_known()}"
        ) from error
    return found.devices


def virtual_devices(count: int):
    """That many devices of the CPU, which this process must not have used before.

    Raises:
      UserError: there cannot be so many.
    """
    if not 1 <= count <= 4096:
        raise UserError(f"--devices {count}; expected 1 to 4096")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


def _known() -> str:
    return "; ".join(f"{name}:{', '.join(chip.sizes)}" for name, chip in CHIPS.items())
