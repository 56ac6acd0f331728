"""How a run learns from SIGTERM and SIGINT that it shall save and stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dmd_jax import processes
from dmd_jax.peers import Peers

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_requests(step: int) -> Iterator[Callable[[int], int]]:
    """Yields a function of the step, to be called after each: the signal that asks to stop, or 0.

    A signal to one of several processes asks all of them, who stop at one step. A second signal
    ends the process at once: whoever asks twice does not want to wait.

    Args:
      step: where the run goes on.
    """
    peers = processes.peers()
    with _of_one() if peers is None else _of_several(peers, step) as requested:
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
def _of_several(peers: Peers, step: int) -> Iterator[Callable[[int], int]]:
    received = []

    def listen() -> None:
        # A thread, as the main one may be waiting for another process in a step.
        while number := reader.recv(1):
            if number[0] in _SIGNALS:
                received.append(number[0])
                if len(received) == 1:
                    peers.stop()
                else:
                    line = "by a second signal that asked it to stop"
                    processes.end(line, 128 + number[0], f"dmd-jax: ended {line}")

    def requested(step: int) -> int:
        if not peers.reached(step):
            return 0
        return received[0] if received else signal.SIGTERM

    peers.reached(step)
    reader, writer = socket.socketpair()
    with reader, writer, _handled_by(lambda number, frame: None):
        writer.setblocking(False)
        threading.Thread(target=listen, daemon=True).start()
        # Python writes the numbers of the signals there even while the main thread is waiting.
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield requested
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def _handled_by(handler) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
