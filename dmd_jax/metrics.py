"""What a run tells while it goes: scalars, pictures, and a progress line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from dmd_jax.errors import UserError
from dmd_jax.files import write_whole
from dmd_jax.pictures import save_png


class MetricsWriter:
    """WORKDIR/metrics.jsonl, TensorBoard events in WORKDIR/tensorboard, WORKDIR/pictures/*.png.

    Args:
      step: where the run goes on; lines of later steps, which will be written again, are dropped.
      enabled: False on every process but the first, which then writes nothing.
    """

    def __init__(self, workdir: Path, *, step: int = 0, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        self._workdir = workdir
        path = workdir / "metrics.jsonl"
        with self._writing():
            _drop_after(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line and one event a scalar."""
        if not self._enabled:
            return
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 [H, W, C] image."""
        if not self._enabled:
            return
        with self._writing():
            save_png(self._workdir / "pictures" / f"{name}-{step:07d}.png", image)
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._events.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"metrics and pictures in {self._workdir}"
            raise UserError(f"{where} cannot be written: {error}") from error


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of WORKDIR/metrics.jsonl, in order; a line torn by a kill is left out."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


class Progress:
    """A line such as `train  1,200/3,000  812.4 images/s  1m05s left  loss_generator 0.123`.

    Rewritten in place on a terminal, a new line now and then elsewhere.

    Args:
      name: of the job. total: units to reach, None where that is not known. start: units done
        before. unit: of the rate; a step counts `per_step` of them.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        *,
        start: int = 0,
        unit: str = "images",
        per_step: int = 1,
        enabled: bool = True,
    ):
        self._name, self._total, self._unit, self._per_step = name, total, unit, per_step
        self._enabled = enabled
        self._first = self._last = start
        self._started = self._measured = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self.rate = 0.0  # units a second since the last update

    def update(self, done: int, note: str = "") -> None:
        """Shows `done` of total, with the rate since the last update and the time left at it."""
        present = time.monotonic()
        elapsed = max(present - self._measured, 1e-9)
        self.rate = (done - self._last) * self._per_step / elapsed
        average = (done - self._first) / max(present - self._started, 1e-9)
        self._last, self._measured = done, present
        of = left = ""
        if self._total is not None:
            of = f"/{self._total:,}"
            left = f"{duration((self._total - done) / average) if average > 0 else '?'} left  "
        line = f"{self._name}  {done:,}{of}  {self.rate:,.1f} {self._unit}/s  {left}{note}".rstrip()
        if self._enabled:
            end = "" if self._terminal and (self._total is None or done < self._total) else "\n"
            print(
                f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True
            )

    def restart(self, done: int) -> None:
        """Takes the time until here (compilation) out of the rate."""
        self._first = self._last = done
        self._started = self._measured = time.monotonic()


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 5h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
