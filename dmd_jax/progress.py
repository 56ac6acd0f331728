"""Progress of what takes long, as lines on stderr."""

from __future__ import annotations

import sys
import time

# The beginning of a line that takes the last one's place. It is known by its identity, since the
# same characters in the name of a file are not meant.
ERASE_LINE = "\r\x1b[K"


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
            if self._terminal:
                sys.stderr.write(ERASE_LINE)
            print(line, end=end, file=sys.stderr, flush=True)

    def restart(self, done: int) -> None:
        """Takes the time until here (compilation) out of the rate."""
        self._first = self._last = done
        self._started = self._measured = time.monotonic()


class Pace:
    """Says when a line of progress is due: `seconds` after the last, or after this was made."""

    def __init__(self, seconds: float = 2.0):
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        present = time.monotonic()
        if present - self._last <= self._seconds:
            return False
        self._last = present
        return True


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 5h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
