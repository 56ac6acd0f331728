"""Several processes as one run on JAX's engine: they join, settle values, and end together.

Values go through the key-value store of JAX's coordination service. It needs no devices, no two
programs alike, and no haste, as collectives do. Its public name is Orbax's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from dmd_jax.errors import UserError, first_line, shown
from dmd_jax.parallel.cluster import find_cluster
from dmd_jax.parallel.lifeline import Lifeline
from dmd_jax.parallel.same_run import check_shared, compare

T = TypeVar("T")

# That a process which is told of another's end has to end with a line of its own.
_GRACE_SECONDS = 1.0
_POLL_SECONDS = 0.25  # at most between two looks at what others have shared


class Processes:
    """The processes of a run, as one of them sees them.

    Args:
      lifeline: has which process this one is, and the others' names.
      store: has key_value_set, key_value_dir_get and key_value_delete of JAX's client.
    """

    def __init__(self, lifeline: Lifeline, store: Any):
        self.index, self.count = lifeline.index, len(lifeline.hosts)
        self.name, self._store = lifeline.name, store
        self._rounds = itertools.count()

    def share(self, name: str, value: Any) -> None:
        """Lets the others know a JSON-able value of this process, by a name that is used once."""
        self._store.key_value_set(f"dmd_jax/{name}/{self.index}", json.dumps(value))

    def shared(self, name: str) -> dict[int, Any]:
        """What has been shared by that name so far, by process."""
        entries = self._store.key_value_dir_get(f"dmd_jax/{name}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in entries}

    def settle(
        self, value: T, judge: Callable[[list[T]], Any], *, timeout: float | None = None
    ) -> Any:
        """judge([process 0's value, process 1's, …]), computed once and returned to all.

        Args:
          value: JSON-able, as is what `judge` returns.
          timeout: seconds that process 0 waits.

        Raises:
          UserError: some have not answered within that time.
        """
        number = next(self._rounds)
        self.share(f"{number}/value", value)
        if self.index == 0:
            values = self._wait(f"{number}/value", range(self.count), timeout)
            self.share(f"{number}/result", judge([values[p] for p in range(self.count)]))
            # All have read it who have come here.
            self._store.key_value_delete(f"dmd_jax/{number - 1}/")
        return self._wait(f"{number}/result", range(1), None)[0]

    def _wait(self, name: str, expected: range, timeout: float | None) -> dict[int, Any]:
        began, pause = time.monotonic(), 0.001
        while len(found := self.shared(name)) < len(expected):
            if timeout is not None and time.monotonic() > began + timeout:
                silent = [self.name(process) for process in expected if process not in found]
                raise UserError(f"{shown(silent)} did not answer within {timeout:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS)
        return found


_lifeline: Lifeline | None = None
_processes: Processes | None = None
_ending = threading.Lock()


def join_processes(
    args: argparse.Namespace,
    prepare: Callable[[], tuple[T, Mapping[str, Any]]],
    *,
    workdir: Path | None = None,
) -> T:
    """Connects to the other processes if the flags say so; all go on, or none does.

    Args:
      prepare: () -> (what to return, facts that must be the same in all, JSON-able by their names).
        It touches no device and writes nothing.
      workdir: a folder that all have to share.

    Raises:
      UserError: the flags are wrong, some process did not come, refuses its input, is of another
        command, config or code than the others, or cannot use the folder; the same in all.
    """
    global _lifeline, _processes
    cluster, timeout = find_cluster(args), args.coordinator_timeout
    if cluster.count == 1:
        return prepare()[0]
    _lifeline = Lifeline(
        cluster.address, cluster.index, cluster.count, timeout=timeout, on_end=_end_too
    )
    # JAX's preemption service hears no SIGINT, and it swallows a second signal: see stopping.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            _lifeline.coordinator,
            cluster.count,
            cluster.index,
            local_device_ids=cluster.devices,
            initialization_timeout=max(int(timeout), 1),
            cluster_detection_method="deactivate",
            coordinator_bind_address=_lifeline.coordinator,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator {cluster.address}: {first_line(error)}") from error
    from orbax.checkpoint import multihost

    _processes = Processes(_lifeline, multihost.get_jax_distributed_client())
    result = compare(_processes, prepare, timeout)
    if workdir is not None:
        check_shared(_processes, workdir, timeout)
    return result


def processes() -> Processes | None:
    """The processes of this run; None where it is a single one."""
    return _processes


def settle(value: T, judge: Callable[[list[T]], Any]) -> Any:
    """judge(each process's value, in their order), the same in all; values are JSON-able."""
    return judge([value]) if _processes is None else _processes.settle(value, judge)


def wait_for_all() -> None:
    """Returns once all processes have come here."""
    settle(None, lambda every: None)


def end(line: str, code: int, said: str) -> None:
    """Ends this process with its exit code if it is one of several, and the others by its line.

    JAX would wait for minutes at its exit for the others, which wait for this one.

    Args:
      said: what this process prints.
    """
    if _lifeline is not None:
        with _ending:
            _lifeline.part()
            _lifeline.tell(f"{_lifeline.name(_lifeline.index)} ended: {line}", code)
            _exit(said, code)


def end_by_a_bug() -> None:
    """As `end`, of an error that nobody foresaw, in whose handler it is called.

    Where the error comes of another process's end, that one's line ends this process instead.
    """
    if _lifeline is not None:
        time.sleep(3 * _GRACE_SECONDS)
        end("by an error that its own output shows", 1, traceback.format_exc())


def leave() -> None:
    """Returns once all processes have done their part of the run; then they miss nobody."""
    wait_for_all()
    if _lifeline is not None:
        _lifeline.part()


def _end_too(line: str, code: int, told: bool) -> None:
    """Ends this process because another one has; called by a thread."""
    if told:
        time.sleep(_GRACE_SECONDS)
    with _ending:
        _exit(f"dmd-jax: error: {line}", code)


def _exit(said: str, code: int) -> None:
    with contextlib.suppress(OSError):
        print(said, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if _lifeline is not None and _lifeline.index == 0:
        # JAX's coordinator lives here, and its clients abort where it is gone.
        _lifeline.wait_until_gone(5.0)
    os._exit(code)
