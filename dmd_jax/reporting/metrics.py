"""What a run tells while it goes: scalars, pictures, and a progress line."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.reporting.pictures import save_png
from dmd_jax.storage.files import in_bucket, write_whole
from dmd_jax.storage.real_files import check_real_file, is_there

log = logging.getLogger(__name__)

_LINES, _EVENTS = "metrics.jsonl", "tensorboard"
_SECONDS_BETWEEN_UPLOADS = 30.0


def must_be_finite(name: str) -> bool:
    """Whether a run ends where this metric is not finite: a loss or a gradient's norm."""
    return name.startswith(("loss", "grad_norm"))


class MetricsWriter:
    """WORKDIR/metrics.jsonl, TensorBoard events in WORKDIR/tensorboard, WORKDIR/pictures/*.png.

    What is in a bucket cannot be appended to. There the lines are written whole, at most twice a
    minute, and the events as one more file, whenever `flush` is called and at the end.

    Args:
      step: where the run goes on; lines of later steps, which will be written again, are dropped.
      digest: `digest` as it was at that step, None where that is not known.
      enabled: False on every process but the first, which then writes nothing.
    """

    def __init__(
        self, workdir: Path, *, step: int = 0, digest: str | None = None, enabled: bool = True
    ):
        self._enabled = enabled
        self._lines = hashlib.sha256()
        if not enabled:
            return
        self._workdir = self._local = workdir
        self._temporary = tempfile.TemporaryDirectory() if in_bucket(workdir) else None
        if self._temporary:
            self._local = Path(self._temporary.name)
        self._uploaded = time.monotonic()
        with self._writing():
            self._copy_until(step)
            self._file = (self._local / _LINES).open("a", encoding="utf-8")
            self._events = self._new_events(purge_step=step + 1)
        if digest not in (None, self.digest):
            log.warning(
                "%s is not as it was at step %d, where the run goes on: its lines until there may "
                "be wrong; the weights do not depend on them",
                *(workdir / _LINES, step),
            )

    @property
    def digest(self) -> str:
        """The SHA-256 of all lines, in hexadecimal, of which the run's checkpoints take note."""
        return self._lines.hexdigest()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line and one event a scalar."""
        if not self._enabled:
            return
        with self._writing():
            line = json.dumps({"step": step, **values}) + "\n"
            self._lines.update(line.encode())
            self._file.write(line)
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            due = time.monotonic() - self._uploaded > _SECONDS_BETWEEN_UPLOADS
            if self._temporary and due:
                self._upload_lines()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 [H, W, C] image."""
        if not self._enabled:
            return
        with self._writing():
            save_png(self._workdir / "pictures" / f"{name}-{step:07d}.png", image)
            self._events.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Puts all that was written into the workdir, to be called before each checkpoint.

        A run that goes on from there then has every line before it.
        """
        if self._enabled and self._temporary:
            with self._writing():
                self._upload_lines()
                self._upload_events()
                self._events = self._new_events()

    def close(self) -> None:
        if not self._enabled:
            return
        failed = sys.exc_info()[0] is not None
        self._file.close()
        self._events.close()
        if self._temporary:
            try:
                with self._writing():
                    self._upload_lines()
                    self._upload_events()
            except UserError:
                if not failed:  # else it would hide what ended the run
                    raise
            finally:
                self._temporary.cleanup()

    def _copy_until(self, step: int) -> None:
        """Takes the workdir's lines up to this step over into the local folder, maybe the same."""
        if not is_there(self._workdir / _LINES):
            return
        kept = [line for line in read_metrics(self._workdir) if line["step"] <= step]
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        self._lines.update(content)
        write_whole(self._local / _LINES, content)

    def _new_events(self, **options: int):
        # It brings the clients of Google's and Amazon's clouds where those are installed.
        from tensorboardX import SummaryWriter

        # The names are those of seconds, and in a bucket a file of the same name is replaced.
        suffix = f".{time.time_ns()}" if self._temporary else ""
        return SummaryWriter(str(self._local / _EVENTS), filename_suffix=suffix, **options)

    def _upload_lines(self) -> None:
        (self._workdir / _LINES).upload(self._local / _LINES)
        self._uploaded = time.monotonic()

    def _upload_events(self) -> None:
        """Ends the file of events, so that each is uploaded once."""
        self._events.close()
        for path in sorted((self._local / _EVENTS).iterdir()):
            (self._workdir / _EVENTS / path.name).upload(path)
            path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"metrics and pictures in {self._workdir}"
            raise UserError(f"{where} cannot be written: {error}") from error


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of WORKDIR/metrics.jsonl, in order.

    Damaged ones, as a kill leaves the last, are left out, with a warning that counts them.

    Raises:
      UserError: something stands in the file's place (`check_real_file`).
    """
    path = workdir / _LINES
    lines, damaged = [], 0
    for text in _content(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line):
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        log.warning("%s: %d damaged lines are left out", path, damaged)
    return lines


def _content(path: Path) -> bytes:
    if not is_there(path):
        return b""
    check_real_file(path, "the metrics of a run", may_be_empty=True)
    return path.read_bytes()


def _is_line(line: Any) -> bool:
    """Whether that is {"step": a whole number, name: number, …}."""
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and all(type(value) in (int, float) for value in line.values())
    )
