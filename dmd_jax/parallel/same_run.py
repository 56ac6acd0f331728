"""Makes sure that the processes of a run are alike, before any of them writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from dmd_jax.errors import UserError, first_line, shown
from dmd_jax.parallel.flags import rounding_flags

if TYPE_CHECKING:
    from dmd_jax.parallel.processes import Processes

T = TypeVar("T")

# That a shared folder may take to show a file to another host.
_SHARED_SECONDS = 30.0


def compare(
    processes: Processes, prepare: Callable[[], tuple[T, Mapping[str, Any]]], timeout: float
) -> T:
    """What `prepare` gives, if it gives the same facts in all processes."""
    result, facts, refusal = None, {}, None
    try:
        result, facts = prepare()
        facts = {"code": code_sha256()[:16], "jax": jax.__version__} | rounding_flags() | facts
    except UserError as error:
        refusal = str(error)

    def refused(refusals: list[str | None]) -> str | None:
        if len(set(refusals)) == 1:
            return refusals[0]
        return next(f"{processes.name(p)}: {text}" for p, text in enumerate(refusals) if text)

    def differing(differences: list[str]) -> str | None:
        told = [f"in {processes.name(p)} {text}" for p, text in enumerate(differences) if text]
        return told and (
            f"the processes are not of one run: {shown(told)}; expected the same command, config, "
            "code and flags in each"
        )

    _raise(processes.settle(refusal, refused, timeout=timeout))
    own = facts if processes.index == 0 else None
    first = processes.settle(own, lambda every: every[0], timeout=timeout)
    differ = difference(facts, first, processes.name(0))
    _raise(processes.settle(differ, differing, timeout=timeout))
    return result


def difference(facts: Mapping[str, Any], first: Mapping[str, Any], name: str) -> str:
    """How facts differ from those of the first process, which has that name; "" if they do not."""
    facts = json.loads(json.dumps(facts))  # as those of the first one came
    return shown(
        f"{key} is {facts.get(key)!r} and {first.get(key)!r} in {name}"
        for key in sorted(facts.keys() | first.keys())
        if facts.get(key) != first.get(key)
    )


def check_shared(processes: Processes, folder: Path, timeout: float) -> None:
    """Raises a UserError in all processes unless all can write to `folder` and see it alike.

    It leaves nothing there but the folder itself.
    """
    token = processes.settle(secrets.token_hex(8), lambda tokens: tokens[0], timeout=timeout)
    own, first = (folder / f".process-{token}-{process}" for process in (processes.index, 0))

    def refused(problems: list[str | None]) -> str | None:
        told = [f"{processes.name(p)}: {text}" for p, text in enumerate(problems) if text]
        return told and (
            f"--workdir {folder} cannot be used by {shown(told)}; expected a folder that all "
            "processes share and can write to"
        )

    there, problem = True, None
    try:
        there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(token)
    except Exception as error:  # A bucket's client raises kinds of its own.
        problem = first_line(error)
    try:
        refusal = processes.settle(problem, refused, timeout=timeout)
        if not refusal:
            unseen = None if _seen(first, token) else "what process 0 writes there is not found"
            refusal = processes.settle(unseen, refused, timeout=timeout + _SHARED_SECONDS)
    finally:
        with contextlib.suppress(Exception):  # as above; it may not be there
            own.unlink()
    # Each has removed its file before any removes the folder.
    processes.settle(None, lambda _: None, timeout=timeout)
    if refusal and not there:
        with contextlib.suppress(Exception):  # as above; another may have removed it
            folder.rmdir()
    _raise(refusal)


def code_sha256() -> str:
    """The SHA-256 over the package's Python files, their names included, in hexadecimal."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _raise(refusal: str | None) -> None:
    if refusal:
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
