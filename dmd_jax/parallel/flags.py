"""JAX's flags: those that change numbers have to be as this package counts on, devices as asked."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Collection

import jax

from dmd_jax.errors import UserError, first_line

# Where one of them differs, the same seed gives other noise, sums have another type, or networks
# and losses are refused by JAX, which cannot check for errors inside of some programs.
EXPECTED = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
}
# Where one of them differs, programs may round otherwise; some make them faster.
ROUNDING = (
    "jax_allow_f16_reductions",
    "jax_compiler_enable_remat_pass",
    "jax_default_matmul_precision",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_softmax_custom_jvp",
    "jax_use_direct_linearize",
    "jax_use_shardy_partitioner",
)
# Packages by which JAX drives accelerators.
_PLUGINS = {
    "jax_cuda12_plugin": "NVIDIA GPU",
    "jax_cuda13_plugin": "NVIDIA GPU",
    "jax_rocm7_plugin": "AMD GPU",
    "libtpu": "TPU",
}


def missing_devices() -> str | None:
    """What is wrong if JAX has no devices of JAX_PLATFORMS here, in a line; None if it has.

    JAX raises an error without a word for some of these. Starts the devices.
    """
    try:
        jax.devices()
    except Exception as error:  # an AssertionError, a RuntimeError, or that of a plugin
        asked = jax.config.jax_platforms
        where = f"JAX_PLATFORMS is {asked}, and JAX" if asked else "JAX"
        reason = f" ({first_line(error)})" if str(error).strip() else ""
        return (
            f"{where} finds no such devices here{reason}; expected an install with their plugin, "
            "such as dmd_jax[gpu] or dmd_jax[tpu], or JAX_PLATFORMS=cpu"
        )
    return None


def fall_back(found: str, asked: str | None, installed: Collection[str]) -> str | None:
    """A line that says that JAX computes on the CPU where something else was meant, or None.

    Args:
      found: the platform of the devices. asked: JAX_PLATFORMS.
      installed: the packages that are.
    """
    if found != "cpu" or (asked and asked.split(",")[0] == "cpu"):
        return None
    if asked:
        return f"JAX_PLATFORMS is {asked}, of which only cpu has devices: computing on the CPU"
    plugins = [name for name in _PLUGINS if name in installed]
    if not plugins:
        return None
    return (
        f"{plugins[0]} is installed, but JAX finds no {_PLUGINS[plugins[0]]} here: computing on "
        "the CPU (JAX_PLATFORMS=cpu if that is meant)"
    )


@functools.cache
def warn_of_fall_back() -> None:
    """Says so on stderr, once, if JAX has fallen back to the CPU. Starts the devices."""
    installed = [name for name in _PLUGINS if importlib.util.find_spec(name)]
    line = fall_back(jax.devices()[0].platform, jax.config.jax_platforms, installed)
    if line:
        print(f"dmd-jax: warning: {line}", file=sys.stderr)


def check_flags() -> None:
    """Raises a UserError that names the first flag by which a seed gives other numbers, or none."""
    for name, expected in EXPECTED.items():
        value = getattr(jax.config, name)
        if value != expected:
            raise UserError(
                f"{name.upper()} is {value!r}, by which the same seed gives other numbers or none; "
                f"expected {expected!r}: take it out of the environment"
            )


def rounding_flags() -> dict[str, str]:
    """What JAX and XLA are told by which programs may round otherwise, by its name.

    The number of virtual CPU devices is not among it: processes may have different numbers.
    """
    environment = {
        name: " ".join(
            sorted(
                flag
                for flag in os.environ.get(name, "").split()
                if not flag.startswith("--xla_force_host_platform_device_count=")
            )
        )
        for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }
    return environment | {name: str(getattr(jax.config, name, None)) for name in ROUNDING}
