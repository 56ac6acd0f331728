"""Traces of some steps of a run, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import in_bucket


def add_profile_argument(parser: argparse.ArgumentParser) -> None:
    """--profile A:B."""
    parser.add_argument(
        "--profile",
        metavar="A:B",
        help="trace steps A to B, counted from 1, into WORKDIR/profile; the first step compiles",
    )


def profiled_steps(given: str | None, steps: int) -> range:
    """The steps that --profile names, of 1 to `steps`; none where it is not given.

    Raises:
      UserError: it is no such range.
    """
    if given is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", given)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= steps:
        raise UserError(
            f"--profile {given}; expected A:B, the first and the last step, with "
            f"1 <= A <= B <= {steps}"
        )
    return range(first, last + 1)


class Profile:
    """The trace of one run; each process writes that of its own devices.

    Args:
      folder: made if need be. steps: to trace, counted from 1.
      done: the steps that the run has behind it; what it has passed is not traced again.
    """

    def __init__(self, folder: Path, steps: range, done: int):
        self._folder, self._steps, self._tracing = folder, steps, False
        # The profiler writes to a disk alone.
        self._temporary = tempfile.TemporaryDirectory() if steps and in_bucket(folder) else None
        self._local = Path(self._temporary.name) if self._temporary else folder
        if steps and steps[-1] <= done and jax.process_index() == 0:
            print(
                f"--profile {steps[0]}:{steps[-1]}: the run is at step {done} already; no trace",
                file=sys.stderr,
            )

    @contextmanager
    def step(self, name: str, number: int) -> Iterator[list[Any]]:
        """Around the step of that number; what it computes belongs into the list."""
        outputs: list[Any] = []
        if number in self._steps and not self._tracing:
            with _written(self._folder):
                jax.profiler.start_trace(self._local)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation(name, step_num=number):
            yield outputs
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(outputs)
            self.close()
            if jax.process_index() == 0:
                print(f"--profile: a trace is in {self._folder}", file=sys.stderr)

    def close(self) -> None:
        """Writes what is traced so far, if anything."""
        if self._tracing:
            self._tracing = False
            with _written(self._folder):
                jax.profiler.stop_trace()
                if self._temporary:
                    self._folder.upload_folder(self._local)
                    self._temporary.cleanup()


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"--profile: {folder} cannot be written: {first_line(error)}") from error
