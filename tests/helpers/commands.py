"""Runs the commands as a user does, in this process or in one of their own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from dmd_jax.commands.cli import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"


def fails(capsys, *argv):
    """The one line of a command that must refuse its input with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("dmd-jax: error: ")
    return lines[0]


def succeeds(*argv):
    assert main([str(argument) for argument in argv]) == 0


def start(*argv, devices=2, largest_file=None, program=("-m", "dmd_jax")):
    """A process of its own, with that many virtual devices.

    Args:
      program: what Python runs.
      largest_file: every write past this many bytes of a file fails, in Python and in C++ alike,
        as all writes do on a full disk.
    """
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, *map(str, program), *map(str, argv)]
    if largest_file is not None:
        limit = (
            "import os, resource, signal, sys;"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file},) * 2);"
            "os.execv(sys.executable, sys.argv[1:])"
        )
        command = [sys.executable, "-c", limit, *command]
        # Reads compiled programs, writes none: a torn one would stay for other tests.
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    return subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    """Its output, once it ended with the exit code that is expected."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
