"""What commands print on streams that are full, closed or narrow, and of names that are hostile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import fails

from dmd_jax.commands.cli import COMMANDS
from dmd_jax.reporting.terminal import escaped, one_line

ROOT = Path(__file__).resolve().parents[2]
DMD = f"{sys.executable} -m dmd_jax"


def shell(command, **env):
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ | env, capture_output=True, timeout=120
    )


@pytest.mark.parametrize("text, shown", [
    ("plain é … 漢字 🙂", "plain é … 漢字 🙂"),
    ("a\x1b[31mb", r"a\x1b[31mb"),
    ("\x00\x07\r\x7f\x9b", r"\x00\x07\r\x7f\x9b"),
    ("\u202e\u2066\u200b\u2028\ufeff", r"\u202e\u2066\u200b\u2028\ufeff"),
    ("\udc80", r"\udc80"),
    ("a\n\tb", "a\n\tb"),
])  # fmt: skip
def test_control_characters_are_escapes(text, shown):
    assert escaped(text) == shown


def test_an_error_is_one_line():
    assert one_line(" a\nb\tc\x1b\n") == r"a\nb\tc\x1b"


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb", "a\rb", "a\u2028b", "a\udcffb"])
def test_names_are_never_printed_raw(capfd, tmp_path, name):
    line = fails(capfd, "sample", "--weights", tmp_path / name, "--out", tmp_path / "x.png")
    assert line.isprintable() and ascii(name)[2:-2] in line


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_in_narrow_encodings(command):
    narrow = shell(f"{DMD} {command} --help", PYTHONIOENCODING="latin-1")
    assert narrow.returncode == 0 and narrow.stdout.startswith(b"usage:") and not narrow.stderr


def test_help_in_the_posix_locale():
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = shell(f"{DMD} --help", **env)
    assert found.returncode == 0 and rb"[--help] \u2026" in found.stdout and found.stdout.isascii()


@pytest.mark.parametrize("command", [
    f"{DMD} --help > /dev/full",
    f"{DMD} sample --help > /dev/full",
    f"{DMD} --help >&-",
    f"set -o pipefail; {DMD} sample --help | (exec <&-; sleep 8)",
])  # fmt: skip
def test_standard_output_that_cannot_be_written_is_one_line(command):
    found = shell(command)
    assert found.returncode == 2
    (line,) = found.stderr.decode().splitlines()
    assert line.startswith("dmd-jax: error: standard output ")


def test_standard_error_that_is_closed_or_full():
    assert shell(f"{DMD} --help 2>&-").returncode == 2
    assert shell(f"{DMD} nonsense 2> /dev/full").returncode == 2
