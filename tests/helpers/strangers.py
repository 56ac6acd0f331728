"""Who else may connect to the port of a run's coordinator, by name."""

import hmac
import json
import os
import socket
import ssl
import time

import pytest


def greeting(token, challenge=None, count=2):
    """As a process of the run greets that has this token, to the challenge that comes."""

    def greet(stranger):
        heard = json.loads(stranger.makefile("rb").readline())
        hello = [1, count, "stranger", "nonce"]
        content = json.dumps([challenge or heard, hello]).encode()
        proof = hmac.new(token.encode(), content, "sha256").hexdigest()
        stranger.sendall(json.dumps([hello, proof]).encode() + b"\n")

    return greet


def hello_of_tls(stranger):
    stranger.settimeout(1)
    context = ssl.create_default_context()
    with pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(stranger, server_hostname="localhost")


def slowly(stranger):
    for _ in range(5):
        stranger.sendall(b"[")
        time.sleep(0.1)


STRANGERS = {
    "port scan": lambda stranger: None,
    "half-open": lambda stranger: time.sleep(0.5),
    "half-closed": lambda stranger: stranger.shutdown(socket.SHUT_WR),
    "http": lambda stranger: stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "http 2 of grpc": lambda stranger: stranger.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    ),
    "tls": hello_of_tls,
    "ssh": lambda stranger: stranger.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "redis": lambda stranger: stranger.sendall(b"*1\r\n$4\r\nPING\r\n"),
    "zeros": lambda stranger: stranger.sendall(bytes(100_000)),
    "random bytes": lambda stranger: stranger.sendall(os.urandom(10_000) + b"\n"),
    "a line without end": lambda stranger: stranger.sendall(b"x" * 3_000_000),
    "a slow sender": slowly,
    "an empty line": lambda stranger: stranger.sendall(b"\n"),
    "json": lambda stranger: stranger.sendall(b"[1]\n"),
    "deep json": lambda stranger: stranger.sendall(b"[" * 100_000 + b"\n"),
    "a huge number": lambda stranger: stranger.sendall(b"9" * 100_000 + b"\n"),
    "not utf-8": lambda stranger: stranger.sendall(b"\xff\xfe\n"),
    "the right shape without a proof": lambda stranger: stranger.sendall(
        b'[[1, 2, "stranger", "nonce"], null]\n'
    ),
    "a proof that is no ascii": lambda stranger: stranger.sendall(
        '[[1, 2, "stranger", "nonce"], "é"]\n'.encode()
    ),
    "another token": greeting("of another run"),
    "no token": greeting(""),
    "a replay": greeting("of this run", challenge="that of another connection"),
    "the end of a process": lambda stranger: stranger.sendall(
        b'{"ended": "x", "code": 0}\n["x", 0]\n'
    ),
    "reset": lambda stranger: stranger.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
    ),
}


def visit(port, behave):
    """A stranger, who finds process 0 listening at the latest after 10 seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with stranger:
        try:
            behave(stranger)
            stranger.settimeout(0.2)
            return stranger.recv(1000)
        except (OSError, ValueError):
            return b""
