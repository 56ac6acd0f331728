"""Makes sure that the processes of a run are alike, before any of them writes."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from dmd_jax.errors import UserError, first_line
from dmd_jax.flags import rounding_flags
from dmd_jax.peers import Peers, shown

T = TypeVar("T")

# That a shared folder may take to show a file to another host.
_SHARED_SECONDS = 30.0


def compare(peers: Peers, prepare: Callable[[], tuple[T, Mapping[str, Any]]], timeout: float) -> T:
    """What `prepare` gives, if it gives the same facts in all processes."""
    result, facts, refusal = None, {}, None
    try:
        result, facts = prepare()
        facts = {
            "code": code_sha256()[:16],
            "jax": jax.__version__,
            **rounding_flags(),
            **facts,
        }
    except UserError as error:
        refusal = str(error)

    def refused(refusals: list[str | None]) -> str | None:
        if len(set(refusals)) == 1:
            return refusals[0]
        told = (f"{peers.name(p)}: {text}" for p, text in enumerate(refusals) if text is not None)
        return next(told)

    _raise(peers.settle(refusal, refused, timeout=timeout))
    # Few processes differ, and thousands of keys of hundreds of processes are much to send.
    differ = peers.settle(_sha256(facts), lambda hashes: len(set(hashes)) > 1, timeout=timeout)
    if differ:
        _raise(peers.settle(facts, lambda every: difference(every, peers.name), timeout=timeout))
    return result


def difference(facts: Sequence[Mapping[str, Any]], name: Callable[[int], str]) -> str | None:
    """How the processes' facts differ from those of process 0, in a line; None if they do not.

    Args:
      name: of a process, by its number.
    """
    lines = []
    for process, theirs in enumerate(facts[1:], start=1):
        keys = [
            f"{key} is {theirs.get(key)!r} and {facts[0].get(key)!r} in {name(0)}"
            for key in sorted(facts[0].keys() | theirs.keys())
            if facts[0].get(key) != theirs.get(key)
        ]
        if keys:
            lines.append(f"in {name(process)} {shown(keys)}")
    if not lines:
        return None
    return (
        f"the processes are not of one run: {shown(lines)}; expected the same command, config, "
        "code and flags in each"
    )


def check_shared(peers: Peers, folder: Path, timeout: float) -> None:
    """Raises a UserError in all processes unless all can write to `folder` and see it alike.

    It leaves nothing there but the folder itself.
    """
    token = peers.settle(secrets.token_hex(8), lambda tokens: tokens[0], timeout=timeout)
    own, first = (folder / f".process-{token}-{process}" for process in (peers.index, 0))
    there = _exists(folder)

    def refused(problems: list[str | None]) -> str | None:
        told = [f"{peers.name(p)}: {text}" for p, text in enumerate(problems) if text is not None]
        if not told:
            return None
        return (
            f"--workdir {folder} cannot be used by {shown(told)}; expected a folder that all "
            "processes share and can write to"
        )

    problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(token)
    except Exception as error:  # A bucket's client raises kinds of its own.
        problem = first_line(error)
    try:
        refusal = peers.settle(problem, refused, timeout=timeout)
        if refusal is None:
            unseen = None if _seen(first, token) else "what process 0 writes there is not found"
            refusal = peers.settle(unseen, refused, timeout=timeout + _SHARED_SECONDS)
    finally:
        _remove(own)
    # Each has removed its file before any removes the folder.
    peers.settle(None, lambda _: None, timeout=timeout)
    if refusal is not None and not there:
        _remove(folder)
    _raise(refusal)


def code_sha256() -> str:
    """The SHA-256 over the package's Python files, their names included, in hexadecimal."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


def _raise(refusal: str | None) -> None:
    if refusal is not None:
        raise UserError(refusal)


def _seen(path: Path, content: str) -> bool:
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        try:
            return path.read_text() == content
        except Exception:  # As above; shared folders may show files late.
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except Exception:  # As above.
        return True


def _remove(path: Path) -> None:
    """Removes a file, or a folder that is empty."""
    with contextlib.suppress(Exception):  # as above; it may not be there, or not be empty
        path.rmdir() if path.is_dir() else path.unlink()
