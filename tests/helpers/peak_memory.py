"""How much memory a conversion takes at its peak, measured in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from commands import ROOT

_CHILD = """
import re, sys
import jax, dmd_jax.commands.cli, dmd_jax.convert.diffusers, dmd_jax.convert.edm
import dmd_jax.convert.inception, dmd_jax.convert.lpips
jax.devices()
jax.eval_shape(lambda: 0)
# Not getrusage's, which begins with the memory of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
assert dmd_jax.commands.cli.main(["convert", *sys.argv[1:]]) == 0
print("bytes", peak() - before)
"""


def peak_of_convert(*arguments) -> int:
    """Bytes that `dmd-jax convert ARGUMENTS` takes above what JAX and the command itself do."""
    command = [sys.executable, "-c", _CHILD, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return int(re.search(r"bytes (\d+)", output)[1])
