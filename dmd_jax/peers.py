"""What the processes of one run tell each other, apart from what their devices exchange.

Process 0 listens at the coordinator's address until all have come, and each of the others keeps its
connection there to the end; JAX's own coordinator follows at the same address. JAX alone would not
do: where its client cannot connect it ends the process with a C++ trace, and it tells neither who
is missing nor that another process has failed. Messages are JSON, one a line.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dmd_jax.errors import UserError

LOST = 75  # exit code where another process is gone: EX_TEMPFAIL, the same command may go well
_LONGEST = 1 << 22  # bytes of a message


def shown(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class Channel:
    """A connection as messages, which any thread may send."""

    def __init__(self, connection: socket.socket):
        # A host that is cut off sends no end of stream; the kernel notices within a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connection, self._lock = connection, threading.Lock()
        self._stream = connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Sends; that the other end is gone is what `messages` tells."""
        line = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(line)

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None at the end, and for anything that is none.

        Raises:
          TimeoutError: none came within these seconds.
        """
        self._connection.settimeout(timeout)
        try:
            message = json.loads(self._stream.readline(_LONGEST))
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def messages(self) -> Iterator[dict[str, Any]]:
        """All messages until the end of the connection."""
        while (message := self.receive()) is not None:
            yield message

    def close(self) -> None:
        """Ends the connection in both directions."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Peers:
    """The processes of a run, as one of them sees them.

    Args:
      index: which of them this is. hosts: the name of each one's machine.
      channels: process 0 has one to each of the others, these have one to process 0.
      on_end: called by a thread with a line, an exit code, and whether that process says so itself,
        when another process has ended before the run did.
    """

    def __init__(
        self,
        index: int,
        hosts: list[str],
        channels: dict[int, Channel],
        on_end: Callable[[str, int, bool], None],
    ):
        self.index, self.hosts = index, hosts
        self._channels, self._on_end = channels, on_end
        self._condition = threading.Condition()
        self._round = 0
        self._values: dict[int, dict[int, Any]] = {}  # process 0's, by round and process
        self._results: dict[int, Any] = {}  # of the others, by round
        self._left: set[int] = set()
        self._position: int | None = None
        self._positions: dict[int, int] = {}
        self._asked_to_stop = False
        self._stop_at: int | None = None
        self._listeners = [
            threading.Thread(target=self._listen, args=item, daemon=True)
            for item in channels.items()
        ]
        for listener in self._listeners:
            listener.start()

    def name(self, process: int) -> str:
        """A process as messages call it."""
        return f"process {process} ({self.hosts[process]})"

    def settle(
        self, value: Any, judge: Callable[[list[Any]], Any], *, timeout: float | None = None
    ) -> Any:
        """judge([process 0's value, process 1's, …]), computed once and returned to all.

        Args:
          value: JSON-able, as is what `judge` returns.
          timeout: seconds that process 0 waits.

        Raises:
          UserError: some have not answered within that time.
        """
        self._round += 1
        number, others = self._round, len(self.hosts) - 1
        if self.index:
            self._channels[0].send({"round": number, "value": value})
            with self._condition:
                self._condition.wait_for(lambda: number in self._results)
                return self._results.pop(number)
        with self._condition:
            values = self._values.setdefault(number, {})
            if not self._condition.wait_for(lambda: len(values) == others, timeout):
                silent = [p for p in range(1, others + 1) if p not in values]
                raise UserError(
                    f"{shown(map(self.name, silent))} did not answer within {timeout:g} s"
                )
            del self._values[number]
        values[0] = value
        result = judge([values[process] for process in range(others + 1)])
        self._tell_others({"round": number, "result": result})
        return result

    def stop(self) -> None:
        """Asks all processes to stop at one step; any thread may."""
        if self.index:
            self._channels[0].send({"stop": True})
        else:
            self._collect_positions()

    def reached(self, step: int) -> bool:
        """Whether to stop here; each process calls it at its start and after every step.

        Once one process has asked, each tells the last step that it called this with, and waits
        for what follows from all: the first step that none has passed.
        """
        with self._condition:
            told = self._position is not None
            self._position = step
            if not self._asked_to_stop:
                return False
            if not told:
                self._tell_position()
            self._condition.wait_for(lambda: self._stop_at is not None)
            return step >= self._stop_at

    def ended(self, line: str, code: int) -> None:
        """Tells the others that this process ends, and why; process 0 sees them off."""
        self._tell_others({"ended": line, "code": code})
        if self.index == 0:
            # JAX's coordinator lives here, and its clients abort where it is gone.
            self.wait_until_gone(5.0)

    def leave(self) -> None:
        """Tells the others that this process has done its part of the run."""
        self._tell_others({"left": True})

    def wait_until_gone(self, seconds: float) -> None:
        """Returns when the connections are closed from the other end, or after these seconds."""
        deadline = time.monotonic() + seconds
        for listener in self._listeners:
            if listener is not threading.current_thread():
                listener.join(max(deadline - time.monotonic(), 0))

    def _tell_others(self, message: dict[str, Any], *, besides: int | None = None) -> None:
        for process, channel in self._channels.items():
            if process != besides:
                channel.send(message)

    def _listen(self, process: int, channel: Channel) -> None:
        for message in channel.messages():
            self._take(process, message)
        if process not in self._left:
            line = f"{self.name(process)} is gone; its own output may tell why"
            self._tell_others({"ended": line, "code": LOST, "of": process}, besides=process)
            self._on_end(line, LOST, False)

    def _take(self, process: int, message: dict[str, Any]) -> None:
        match message:
            case {"round": number, "value": value}:
                with self._condition:
                    self._values.setdefault(number, {})[process] = value
                    self._condition.notify_all()
            case {"round": number, "result": result}:
                with self._condition:
                    self._results[number] = result
                    self._condition.notify_all()
            case {"stop": True}:
                self._collect_positions()
            case {"where": True}:
                self._ask_to_stop()
            case {"position": step}:
                self._add_position(process, step)
            case {"stop_at": step}:
                self._agree_to_stop(step)
            case {"left": True}:
                self._left.add(process)
            case {"ended": line, "code": code, **rest}:
                if "of" not in rest:
                    line = f"{self.name(process)} ended: {line}"
                    # Relayed by process 0, which says who.
                    rest = {"of": process}
                self._left |= {process, rest["of"]}
                if self.index == 0:
                    self._tell_others({"ended": line, "code": code, **rest}, besides=process)
                self._on_end(line, code, True)

    def _collect_positions(self) -> None:
        self._tell_others({"where": True})
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        with self._condition:
            if not self._asked_to_stop:
                self._asked_to_stop = True
                if self._position is not None:
                    self._tell_position()

    def _tell_position(self) -> None:
        if self.index:
            self._channels[0].send({"position": self._position})
        else:
            self._add_position(0, self._position)

    def _add_position(self, process: int, step: int) -> None:
        with self._condition:
            self._positions[process] = step
            if len(self._positions) < len(self.hosts):
                return
            stop_at = max(self._positions.values()) + 1
        self._tell_others({"stop_at": stop_at})
        self._agree_to_stop(stop_at)

    def _agree_to_stop(self, step: int) -> None:
        with self._condition:
            self._stop_at = step
            self._condition.notify_all()
