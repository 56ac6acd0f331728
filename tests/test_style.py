"""ruff, at the version that is pinned, has nothing to say."""

import subprocess
import sys

import pytest
from commands import ROOT


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=lambda words: words[0])
def test_ruff_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache"]
    places = ("dmd_jax", "configs", "tests", "setup.py")
    found = subprocess.run([*ruff, *places], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
