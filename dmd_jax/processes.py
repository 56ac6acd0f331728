"""Several processes as one run: they join, make sure that they are alike, and end together."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from dmd_jax.agreement import check_shared, compare
from dmd_jax.errors import UserError, first_line
from dmd_jax.peers import Peers
from dmd_jax.roll_call import call_roll

T = TypeVar("T")

# That a process which is told of another's end has to end with a line of its own.
_GRACE_SECONDS = 1.0

_peers: Peers | None = None
_ending = threading.Lock()


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that join several processes to one run."""
    group = parser.add_argument_group("several processes (each runs the same command)")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, or 'auto' where the cluster tells (Cloud TPU, Slurm)",
    )
    group.add_argument("--processes", metavar="N", type=int, help="how many processes there are")
    group.add_argument("--process", metavar="I", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--coordinator-timeout",
        metavar="SECONDS",
        type=float,
        default=300.0,
        help="for all to come (default: 300)",
    )


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
    global _peers
    cluster = _cluster(args)
    if cluster.count == 1:
        return prepare()[0]
    _peers = call_roll(
        cluster.address,
        cluster.index,
        cluster.count,
        timeout=args.coordinator_timeout,
        on_end=_end_too,
    )
    result = compare(_peers, prepare, args.coordinator_timeout)
    if workdir is not None:
        check_shared(_peers, workdir, args.coordinator_timeout)
    # A stop is agreed on by the peers, SIGINT too, and a second signal is not swallowed.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.count,
            cluster.index,
            local_device_ids=cluster.devices,
            initialization_timeout=max(int(args.coordinator_timeout), 1),
            cluster_detection_method="deactivate",
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator {cluster.address}: {first_line(error)}") from error
    return result


def peers() -> Peers | None:
    """The processes of this run; None where it is a single one."""
    return _peers


def settle(value: T, judge: Callable[[list[T]], Any]) -> Any:
    """judge(each process's value, in their order), the same in all; values are JSON-able."""
    return judge([value]) if _peers is None else _peers.settle(value, judge)


def wait_for_all() -> None:
    """Returns once all processes have come here."""
    settle(None, lambda every: None)


def end(line: str, code: int, said: str) -> None:
    """Ends this process with its exit code if it is one of several, and the others by its line.

    JAX would wait for minutes at its exit for the others, which wait for this one.

    Args:
      said: what this process prints.
    """
    if _peers is None:
        return
    with _ending:
        print(said, file=sys.stderr)
        _peers.ended(line, code)
        _exit(code)


def end_by_a_bug() -> None:
    """As `end`, of an error that nobody foresaw, in whose handler it is called.

    Where the error comes of another process's end, that one's line ends this process instead.
    """
    if _peers is not None:
        time.sleep(3 * _GRACE_SECONDS)
        end("by an error that its own output shows", 1, traceback.format_exc())


def leave() -> None:
    """Tells the others that this process has done its part, so that they do not miss it."""
    if _peers is not None:
        _peers.leave()


def _end_too(line: str, code: int, told: bool) -> None:
    """Ends this process because another one has; called by a thread."""
    if told:
        time.sleep(_GRACE_SECONDS)
    with _ending:
        print(f"dmd-jax: error: {line}", file=sys.stderr)
        if _peers is not None:
            _peers.wait_until_gone(2 * _GRACE_SECONDS if _peers.index == 0 else 0)
        _exit(code)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Cluster(NamedTuple):
    address: str
    index: int
    count: int
    devices: Sequence[int] | None  # of this process, where the cluster gives each its own


def _cluster(args: argparse.Namespace) -> _Cluster:
    if args.coordinator_timeout <= 0:
        raise UserError(f"--coordinator-timeout {args.coordinator_timeout:g}; expected seconds")
    given = args.processes is not None, args.process is not None
    if args.coordinator is None:
        if any(given):
            raise UserError("--processes and --process need --coordinator HOST:PORT")
        return _Cluster("", 0, 1, None)
    if args.coordinator == "auto":
        if any(given):
            raise UserError("--coordinator auto finds --processes and --process; expected neither")
        return _found_cluster(args.coordinator_timeout)
    if not all(given):
        raise UserError(f"--coordinator {args.coordinator} needs --processes and --process")
    if not 0 <= args.process < args.processes:
        raise UserError(
            f"--process {args.process} of --processes {args.processes}; expected one from 0 to "
            f"{args.processes - 1}"
        )
    return _Cluster(args.coordinator, args.process, args.processes, None)


def _found_cluster(timeout: float) -> _Cluster:
    """What the machine says of the cluster that it is in."""
    # What jax.distributed.initialize() itself asks; it goes on to connect at once.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, max(int(timeout), 1)
        )
    except Exception as error:  # Each kind of cluster raises its own.
        raise UserError(f"--coordinator auto: {first_line(error)}") from error
    if address is None or count is None or index is None:
        raise UserError(
            "--coordinator auto finds no cluster here; expected a Cloud TPU, Slurm, Open MPI or "
            "Kubernetes, or --coordinator HOST:PORT with --processes and --process"
        )
    if count == 1:
        print("--coordinator auto: the cluster has this process alone", file=sys.stderr)
    return _Cluster(address, index, count, devices)
