"""The exceptions that a command turns into one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input. A command prints the message as one line and exits with code 2.

    The message says what is wrong, where (path, key, argument), and what was expected.
    """


class Stopped(Exception):
    """The run was asked to stop by a signal, and its state is in a checkpoint."""

    def __init__(self, step: int, signal_number: int, workdir: Path):
        super().__init__(f"stopped at step {step}; go on with --workdir {workdir}")
        self.step, self.signal_number = step, signal_number


def differing(there: Mapping[str, Any], here: Mapping[str, Any], form: str) -> str:
    """The values in which two mappings differ, for a message; "" where they are the same.

    Args:
      form: of one of them, by its name and what it is there and here; None where it is missing.
    """
    return "; ".join(
        form.format(name, there.get(name), here.get(name))
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )


def first_line(error: BaseException) -> str:
    """What another library raised, as a short single line to quote in a UserError."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def shown(names: Iterable[str]) -> str:
    """The first five of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
