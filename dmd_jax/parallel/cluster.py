"""Which of a run's processes this one is: told by flags, or by the cluster.

`--coordinator auto` reads JAX's cluster detection, which has no public name.
`jax.distributed.initialize()` reads it too, but connects at once, and its client aborts where a
process does not come (see lifeline.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dmd_jax.errors import UserError, first_line


class Cluster(NamedTuple):
    """The address of process 0, and which process this one is of how many."""

    address: str
    index: int
    count: int
    devices: Sequence[int] | None = None  # of this process, where the cluster gives each its own


def find_cluster(args: argparse.Namespace) -> Cluster:
    """Reads the flags of `add_process_arguments`; raises a UserError where they are no run."""
    if args.coordinator_timeout <= 0:
        raise UserError(f"--coordinator-timeout {args.coordinator_timeout:g}; expected seconds")
    given = args.processes is not None, args.process is not None
    if args.coordinator is None:
        if any(given):
            raise UserError("--processes and --process need --coordinator HOST:PORT")
        return Cluster("", 0, 1)
    if args.coordinator == "auto":
        if any(given):
            raise UserError("--coordinator auto finds --processes and --process; expected neither")
        return _detect(args.coordinator_timeout)
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {args.coordinator}; expected HOST:PORT or auto")
    if not all(given):
        raise UserError(f"--coordinator {args.coordinator} needs --processes and --process")
    if not 0 <= args.process < args.processes:
        raise UserError(
            f"--process {args.process} of --processes {args.processes}; expected one from 0 to "
            f"{args.processes - 1}"
        )
    return Cluster(args.coordinator, args.process, args.processes)


def _detect(timeout: float) -> Cluster:
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
    return Cluster(address, index, count, devices)
