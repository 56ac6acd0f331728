"""Who of a run's processes has come, and how each one ends: what JAX's engine cannot tell.

Where a process does not come, or another one dies, JAX's client (0.10 and 0.12) names nobody and
aborts with a C++ trace, and a Python callback for that dies of std::bad_cast. Nor does JAX 0.10
know a password. So process 0 listens at the coordinator's address, on no other interface, and calls
the roll before JAX connects; the others keep these connections until they end. Each side proves by
HMAC over the other's challenge that it has the same DMD_JAX_TOKEN. JAX's coordinator is at process
0's loopback, and the others reach it through the same port, by a relay that does not close towards
JAX when process 0 dies: the lifeline tells it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any

from dmd_jax.errors import UserError, shown

LOST = 75  # exit code where another process is gone: EX_TEMPFAIL, the same command may go well
_LONGEST = 1 << 20  # bytes of a message
_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 10.0  # that a connection may be silent before it has said who it is
# The others wait longer than process 0, which may have begun earlier and knows who is missing.
_MORE_SECONDS = 10.0


class _Server(socketserver.ThreadingTCPServer):
    """Has `greet` called with each connection, by a thread; the connection ends when it returns."""

    allow_reuse_address = daemon_threads = True
    block_on_close = False  # the threads go on with those that were taken in
    request_queue_size = 1024

    def __init__(self, host: str, port: int, greet: Callable[[socket.socket], None]):
        # IPv4 first, as `localhost` may be both.
        found = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        self.address_family, *_, place = found
        self.finish_request = lambda connection, _: greet(connection)
        super().__init__(place, None)


class Lifeline:
    """Connections from process 0 to each other process, open until these end.

    It returns once all processes have come. `coordinator` is the address of JAX's coordinator then,
    as this process reaches it.

    Args:
      address: HOST:PORT, where process 0 listens, or at JAX_COORDINATOR_BIND_ADDRESS if its own
        address is another one.
      index, count: of the processes.
      timeout: seconds to wait for all.
      on_end: called by a thread with a line, an exit code, and whether that process says so itself,
        when another process has ended before the run did.

    Raises:
      UserError: not all came in time, two are the same, or they do not agree how many there are;
        all that came get the same message.
    """

    def __init__(
        self,
        address: str,
        index: int,
        count: int,
        *,
        timeout: float,
        on_end: Callable[[str, int, bool], None],
    ):
        self.index, self.hosts = index, [""] * count
        self.coordinator = ""
        self._address, self._on_end, self._over = address, on_end, False
        self._sockets: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._nonces: dict[int, str] = {}
        self._refusal: str | None = None
        self._called = False
        self.hosts[index] = socket.gethostname()
        (self._report if index else self._call_roll)(timeout)
        if self._refusal:
            raise UserError(f"--coordinator {address}: {self._refusal}")

    def name(self, process: int) -> str:
        """A process as messages call it."""
        return f"process {process} ({self.hosts[process]})"

    def part(self) -> bool:
        """Has nobody missed from here on; False where that was so before."""
        with self._changed:
            before, self._over = self._over, True
        return not before

    def tell(self, line: str, code: int) -> None:
        """Tells the others that a process has ended, and how."""
        for connection in list(self._sockets.values()):
            _send(connection, [line, code])

    def wait_until_gone(self, seconds: float) -> None:
        """Returns when the others have ended their connections, or after these seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sockets, seconds)

    def _follow(self, process: int, stream) -> None:
        """Waits for a word of the process at the other end, or for its end."""
        line, code, told = f"{self.name(process)} is gone; its own output may tell why", LOST, False
        with contextlib.suppress(OSError, ValueError):
            match _receive(stream):
                case [str(said), int(number)] if number > 0:
                    line, code, told = said, number, True
        with self._changed:
            self._sockets.pop(process, None)
            self._changed.notify_all()
            if not self._called and not self._refusal:
                self.hosts[process] = ""  # It may come again.
                return
        if self.part():
            if self.index == 0:
                self.tell(line, code)
            self._on_end(line, code, told)

    def _call_roll(self, timeout: float) -> None:
        """Process 0's part."""
        host, port = _parts(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or self._address)
        try:
            server = _Server(host, port, self._greet)
        except OSError as error:
            raise UserError(
                f"--coordinator {self._address}: process 0 cannot listen at port {port} of {host}: "
                f"{error.strerror}"
            ) from error
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._refusal or all(self.hosts), timeout)
            self._called = True
            missing = [str(i) for i, host in enumerate(self.hosts) if not host]
            if missing and not self._refusal:
                at = server.server_address[0]
                self._refusal = (
                    f"{len(self.hosts) - len(missing)} of {len(self.hosts)} processes came within "
                    f"{timeout:g} s; missing: {shown(missing)}"
                    + (f"; process 0 listened at {at}" if at != host else "")
                )
        if self._refusal:
            self.part()
            server.shutdown()
            server.server_close()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        answer = [self.hosts, self._refusal]
        for process, connection in list(self._sockets.items()):
            _send(connection, [answer, _proof(self._nonces[process], answer)])

    def _greet(self, connection: socket.socket) -> None:
        """Takes in a process that has the token; whoever else connects is not answered."""
        challenge = secrets.token_hex()
        try:
            stream = _stream(connection)
            _send(connection, challenge)
            hello, proof = _receive(stream)
            if not hmac.compare_digest(proof, _proof(challenge, hello)):
                return
            process, count, host, nonce = hello
            if not 0 < process < count:
                return
            connection.settimeout(None)
        except Exception:  # A stranger may send anything.
            return
        if nonce is None:
            with contextlib.suppress(OSError, ValueError):  # It is not there yet: as _relay.
                local = socket.create_connection(_parts(self.coordinator))
                _join(stream, connection, local.makefile("rb"), local)
            return
        with self._changed:
            if self._called:
                return
            if count != len(self.hosts):
                self._refusal = (
                    f"process {process} ({host}) was started with --processes {count} and "
                    f"{self.name(0)} with {len(self.hosts)}; expected the same"
                )
            elif self.hosts[process]:
                self._refusal = (
                    f"{host} came as process {process} of {count}; {self.hosts[process]} is that "
                    "one already"
                )
                process = -1
            else:
                self.hosts[process] = host
            self._sockets[process], self._nonces[process] = connection, nonce
            self._changed.notify_all()
        self._follow(process, stream)

    def _report(self, timeout: float) -> None:
        """The part of the others."""
        host, deadline = self.hosts[self.index], time.monotonic() + timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), _RETRY_SECONDS)
                connection = socket.create_connection(_parts(self._address), timeout=left)
                break
            except OSError as error:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise UserError(
                        f"--coordinator {self._address} did not answer process {self.index} "
                        f"({host}) within {timeout:g} s ({error.strerror or error}); expected "
                        "process 0 there"
                    ) from error
                time.sleep(_RETRY_SECONDS)
        nonce = secrets.token_hex()
        try:
            stream = self._introduce(connection, nonce)
            connection.settimeout(timeout + _MORE_SECONDS)
            answer, proof = _receive(stream)
            if not hmac.compare_digest(proof, _proof(nonce, answer)):
                raise ValueError
            self.hosts, self._refusal = answer
            connection.settimeout(None)
        except Exception as error:  # Whatever listens there may send anything.
            raise UserError(
                f"--coordinator {self._address} answered process {self.index} ({host}), but not as "
                "a process 0 that waits for it; expected a free port for each run, each process "
                "once, and the same DMD_JAX_TOKEN in all"
            ) from error
        self._sockets[0], self._called = connection, True
        threading.Thread(target=self._follow, args=(0, stream), daemon=True).start()
        relay = _Server("127.0.0.1", 0, self._relay)
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        self.coordinator = f"127.0.0.1:{relay.server_address[1]}"

    def _introduce(self, connection: socket.socket, nonce: str | None):
        """Says to process 0 who this is; returns what comes of it.

        Args:
          nonce: for its proof at the roll call; None for a connection to JAX's coordinator.
        """
        stream = _stream(connection)
        hello = [self.index, len(self.hosts), self.hosts[self.index], nonce]
        _send(connection, [hello, _proof(_receive(stream), hello)])
        return stream

    def _relay(self, near: socket.socket) -> None:
        """Takes a connection of JAX's client to process 0, and keeps it when that is gone."""
        with contextlib.suppress(OSError, ValueError):  # JAX's client tries again.
            far = socket.create_connection(_parts(self._address))
            stream = self._introduce(far, None)
            far.settimeout(None)
            _join(near.makefile("rb"), near, stream, far)


def _join(stream, connection: socket.socket, other_stream, other: socket.socket) -> None:
    """Passes on what comes at either connection until the first one ends, which ends the other."""
    threading.Thread(target=_pump, args=(other_stream, connection), daemon=True).start()
    _pump(stream, other)
    other.shutdown(socket.SHUT_RDWR)


def _pump(source, sink: socket.socket) -> None:
    """Passes on what comes until the source ends, even where nobody takes it any more."""
    with contextlib.suppress(OSError):
        while data := source.read1(1 << 16):
            with contextlib.suppress(OSError):
                sink.sendall(data)


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _proof(challenge: str, content: Any) -> str:
    """That who sends the content knows the token."""
    token = os.environ.get("DMD_JAX_TOKEN", "").encode()
    return hmac.new(token, json.dumps([challenge, content]).encode(), "sha256").hexdigest()


def _send(connection: socket.socket, message: Any) -> None:
    """Sends; that the other end is gone is what reading tells."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(stream) -> Any:
    """The next message; a ValueError at the end, and for anything that is none."""
    return json.loads(stream.readline(_LONGEST))


def _stream(connection: socket.socket):
    """What comes in; the kernel notices the loss of the other host within 20 seconds."""
    connection.settimeout(_HELLO_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection.makefile("rb")
