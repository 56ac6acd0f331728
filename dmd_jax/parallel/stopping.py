"""How a run learns from SIGTERM and SIGINT that it shall save and stop.

`multihost_utils.reached_preemption_sync_point` would not do for several processes: it hears SIGTERM
alone, takes it from Python, which then hears no second one, and holds Python's lock while it waits
for JAX's coordinator, which is reached through Python (lifeline.py).
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from dmd_jax.parallel import processes
from dmd_jax.parallel.processes import Processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 1.0  # between two looks whether another process has been asked
_meetings = itertools.count()


@contextmanager
def stop_requests(step: int) -> Iterator[Callable[[int], int]]:
    """Yields a function of the step, to be called after each: the signal that asks to stop, or 0.

    A signal to one of several processes asks all of them, who stop at one step. A second signal
    ends the process at once: whoever asks twice does not want to wait.

    Args:
      step: where the run goes on.
    """
    run = processes.processes()
    with _of_one() if run is None else _of_several(_Meeting(run, step)) as requested:
        yield requested


@contextmanager
def _of_one() -> Iterator[Callable[[int], int]]:
    received = []

    def receive(number, frame):
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    with _handled_by(receive):
        yield lambda step: received[0] if received else 0


@contextmanager
def _of_several(meeting: _Meeting) -> Iterator[Callable[[int], int]]:
    reader, writer = socket.socketpair()
    with reader, writer, _handled_by(lambda number, frame: None):
        writer.setblocking(False)
        # A thread, as the main one may be waiting for another process in a step. Python writes the
        # numbers of the signals there even then.
        listener = threading.Thread(target=meeting.listen, args=(reader,), daemon=True)
        listener.start()
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield meeting.requested
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            listener.join()


class _Meeting:
    """The first step that no process has passed when all have heard that one was asked to stop."""

    def __init__(self, run: Processes, step: int):
        self._run, self._name = run, f"stop{next(_meetings)}"
        self._position, self._told, self._stop_at = step, False, None
        self._changed, self._received = threading.Condition(), []

    def requested(self, step: int) -> int:
        """As `stop_requests`; waits for the others' positions once this process told its own."""
        with self._changed:
            if not self._told:
                self._position = step
                return 0
            self._changed.wait_for(lambda: self._stop_at is not None)
        if step < self._stop_at:
            return 0
        return self._received[0] if self._received else signal.SIGTERM

    def listen(self, reader: socket.socket) -> None:
        """Takes signals until the writer's end is closed, and looks for those of others."""
        # Where the store is gone, the lifeline ends this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while True:
                reader.settimeout(_POLL_SECONDS / 10 if self._told else _POLL_SECONDS)
                try:
                    number = reader.recv(1)
                    if not number:
                        break
                    self._receive(number[0])
                except TimeoutError:
                    self._look()
            # The others may be asked when this process has done its last step.
            self._tell_position()

    def _receive(self, number: int) -> None:
        if number not in _SIGNALS:
            return
        self._received.append(number)
        if len(self._received) == 1:
            self._run.share(f"{self._name}/asked", number)
            self._look()
        else:
            line = "by a second signal that asked it to stop"
            processes.end(line, 128 + number, f"dmd-jax: ended {line}")

    def _look(self) -> None:
        if not self._told and self._run.shared(f"{self._name}/asked"):
            self._tell_position()
        if self._told and self._stop_at is None:
            positions = self._run.shared(f"{self._name}/position")
            if len(positions) == self._run.count:
                with self._changed:
                    self._stop_at = max(positions.values()) + 1
                    self._changed.notify_all()

    def _tell_position(self) -> None:
        with self._changed:
            told, self._told = self._told, True
        if not told:
            self._run.share(f"{self._name}/position", self._position)


@contextmanager
def _handled_by(handler) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
