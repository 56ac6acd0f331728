"""Where a figure comes from: the command and the machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys

import jax


def command_line() -> str:
    """The command that this process runs, as a person would type it."""
    return shlex.join(["dmd-jax", *sys.argv[1:]])


def machine() -> str:
    """The hardware that figures were measured on, in a line."""
    devices = jax.devices()
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    )
