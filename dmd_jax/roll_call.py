"""How the processes of a run find each other: process 0 waits at an address until all have come."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable

from dmd_jax.errors import UserError
from dmd_jax.peers import Channel, Peers, shown

_GREETING = "dmd-jax"
_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 10.0  # that a connection has to say who it is
# The others wait longer than process 0, which may have begun earlier and knows who is missing.
_MORE_SECONDS = 10.0


def call_roll(
    address: str,
    index: int,
    count: int,
    *,
    timeout: float,
    on_end: Callable[[str, int, bool], None],
) -> Peers:
    """Returns once all processes have come; the address is free again then.

    Args:
      address: HOST:PORT, where process 0 listens. index, count: of the processes.
      timeout: seconds to wait.
      on_end: as of Peers.

    Raises:
      UserError: not all came in time, two are the same, or they do not agree how many there are;
        all that came get the same message.
    """
    host, port = parse_address(address)
    if index == 0:
        return _receive(address, port, count, timeout, on_end)
    return _report(address, (host, port), index, count, timeout, on_end)


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT as its parts.

    Raises:
      UserError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {address}; expected HOST:PORT or auto")
    return host.strip("[]"), int(port)


def _receive(address, port: int, count: int, timeout: float, on_end) -> Peers:
    """Process 0's part."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, backlog=count, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise UserError(
            f"--coordinator {address}: process 0 cannot listen at port {port}: {error.strerror}"
        ) from error
    arrivals: queue.Queue[tuple[Channel, dict]] = queue.Queue()
    threading.Thread(target=_accept, args=(server, arrivals), daemon=True).start()
    hosts, channels = {0: socket.gethostname()}, {}
    refusal = None
    deadline = time.monotonic() + timeout
    while len(hosts) < count and refusal is None:
        try:
            channel, hello = arrivals.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            missing = [str(process) for process in range(count) if process not in hosts]
            refusal = (
                f"{len(hosts)} of {count} processes came within {timeout:g} s; "
                f"missing: {shown(missing)}"
            )
            break
        process = hello["process"]
        if hello["processes"] != count:
            refusal = (
                f"process {process} ({hello['host']}) was started with --processes "
                f"{hello['processes']} and process 0 ({hosts[0]}) with {count}; expected the same"
            )
        elif process in hosts or not 0 < process < count:
            other = f"; {hosts[process]} is that one already" if process in hosts else ""
            refusal = f"{hello['host']} came as process {process} of {count}{other}"
        else:
            hosts[process] = hello["host"]
        channels[process if refusal is None else -1] = channel
    # JAX's coordinator takes the port; the connections that are open stay.
    _stop_listening(server)
    names = [hosts.get(process, "") for process in range(count)]
    for channel in channels.values():
        channel.send({"refused": refusal} if refusal else {"hosts": names})
    if refusal:
        raise UserError(f"--coordinator {address}: {refusal}")
    return Peers(0, names, channels, on_end)


def _accept(server: socket.socket, arrivals: queue.Queue) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # no longer listening
            return
        threading.Thread(target=_greet, args=(connection, arrivals), daemon=True).start()


def _greet(connection: socket.socket, arrivals: queue.Queue) -> None:
    """Hands a process of a run on; whoever else connects is not answered."""
    channel = Channel(connection)
    try:
        hello = channel.receive(_HELLO_SECONDS)
    except TimeoutError:
        hello = None
    match hello:
        case {"run": greeting, "process": int(), "processes": int(), "host": str()} if (
            greeting == _GREETING
        ):
            arrivals.put((channel, hello))
        case _:
            channel.close()


def _stop_listening(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # which wakes accept() up; close() alone does not
    server.close()


def _report(address, place: tuple[str, int], index: int, count: int, timeout, on_end) -> Peers:
    """The part of the others."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = max(deadline - time.monotonic(), _RETRY_SECONDS)
            connection = socket.create_connection(place, timeout=left)
            break
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise UserError(
                    f"--coordinator {address} did not answer process {index} "
                    f"({socket.gethostname()}) within {timeout:g} s ({error.strerror or error}); "
                    "expected process 0 there"
                ) from error
            time.sleep(_RETRY_SECONDS)
    channel = Channel(connection)
    host = socket.gethostname()
    channel.send({"run": _GREETING, "process": index, "processes": count, "host": host})
    try:
        answer = channel.receive(timeout + _MORE_SECONDS)
    except TimeoutError:
        answer = None
    match answer:
        case {"hosts": list(hosts)}:
            return Peers(index, hosts, {0: channel}, on_end)
        case {"refused": str(refusal)}:
            raise UserError(f"--coordinator {address}: {refusal}")
    raise UserError(
        f"--coordinator {address} answered process {index} ({host}), but not as a process 0 that "
        "waits for it; expected a free port for each run, and each process once"
    )
