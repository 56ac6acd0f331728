"""`dmd-jax bench`: how fast a config's step or its images are here, and beside others'."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from ml_collections import ConfigDict

from dmd_jax.commands.arguments import add_process_arguments, write_results
from dmd_jax.config import flatten, load_config
from dmd_jax.distillation.from_config import check_batches, mesh_of
from dmd_jax.errors import UserError, first_line
from dmd_jax.parallel.processes import join_processes
from dmd_jax.performance.benchmark.own_images import OwnImages
from dmd_jax.performance.benchmark.own_step import OwnStep
from dmd_jax.performance.benchmark.peaks import peak_flops
from dmd_jax.performance.benchmark.rivals import Heat, Rival, run_heat
from dmd_jax.performance.benchmark.table import table
from dmd_jax.reporting.provenance import command_line, machine
from dmd_jax.storage.files import local_path
from dmd_jax.storage.weights import sampling_of
from dmd_jax.teachers.text_parts import DECODERS

# (config, our side) -> what makes the peer of it.
Peer = Callable[[ConfigDict, OwnStep | OwnImages], Callable[[], Rival]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        required=True,
        help="a Python file with get_config(); --config.KEY=VALUE overrides a value; weights and "
        "data are random, none is read",
    )
    parser.add_argument(
        "--what",
        choices=("train", "sample", "latency"),
        default="train",
        help="train: the step of `dmd-jax train`; sample: config.pairs.batch_size images in one "
        "step; latency: one image, on one device (default: train)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="that are timed (default: 20)"
    )
    parser.add_argument(
        "--peer",
        metavar="MODULE:FUNCTION",
        action="append",
        default=[],
        help="the same by a function, in turns with ours; the checkout's tests.torch_peer:eager "
        "and tests.torch_peer:compiled are PyTorch; may be given several times",
    )
    parser.add_argument(
        "--separately",
        action="store_true",
        help="one after the other rather than in turns, ours last, so that one at a time has the "
        "memory",
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="all figures, for programs")
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> None:
    def prepare() -> tuple[ConfigDict, dict[str, Any]]:
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}; expected at least 1")
        config = load_config(args.config, args.overrides)
        values = {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
        return config, {"command": "bench", "what": args.what, "steps": args.steps, **values}

    peers = {name: _peer(name) for name in args.peer}
    if peers:
        # JAX would else take three quarters of a GPU's memory before another library gets any.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = join_processes(args, prepare)
    devices = {"train": jax.device_count(), "sample": jax.local_device_count(), "latency": 1}
    peak = peak_flops(jax.devices()[0].device_kind)
    options = {
        "separately": args.separately,
        "peak": None if peak is None else peak * devices[args.what],
        "told": _tell,
    }
    results = {
        "command": command_line(),
        "machine": machine(),
        "config": " ".join([args.config, *args.overrides]),
        "compute_dtype": config.compute_dtype,
        "matmul_precision": config.matmul_precision,
        "devices": devices[args.what],
        "heats": [run_heat(heat, args.steps, **options) for heat in _heats(config, args, peers)],
    }
    if jax.process_index() == 0:
        print(table(results))
        if args.json is not None:
            write_results(args.json, results)


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(f"bench: {line}", file=sys.stderr, flush=True)


def _heats(
    config: ConfigDict, args: argparse.Namespace, peers: Mapping[str, Peer]
) -> Iterator[Heat]:
    """One after the other, so that each has the devices for itself."""
    if args.what == "train":
        mesh = mesh_of(config)
        check_batches(config, mesh, "config")
        yield _heat("training step", config, OwnStep(config, mesh), peers)
        return
    devices = jax.local_devices()
    # Rounded up to a multiple of the devices, as `dmd-jax sample` does.
    count = -(-config.pairs.batch_size // len(devices)) * len(devices)
    if args.what == "latency":
        devices, count = devices[:1], 1
    names: list[str | None] = [None]
    if config.teacher.text_encoder:
        names = [name for name in DECODERS if config.teacher[name]]
    for decoder in names:
        steps = sampling_of(config.objective).get("num_steps", 1)
        count_of_steps = "one step" if steps == 1 else f"{steps} steps"
        title = f"to pixels in {count_of_steps}" + (f", by {decoder}" if decoder else "")
        own = OwnImages(config, count=count, decoder=decoder, devices=devices)
        yield _heat(title, config, own, peers)


def _heat(
    title: str, config: ConfigDict, own: OwnStep | OwnImages, peers: Mapping[str, Peer]
) -> Heat:
    makers = {name: peer(config, own) for name, peer in peers.items()}
    uneven = getattr(own, "uneven", False)
    return Heat(title, own.images, own.flops, functools.partial(_rival, own), makers, uneven)


def _rival(own: OwnStep | OwnImages) -> Rival:
    with _fitting():
        own.prepare()
    return Rival(own, own.facts, own.release)


@contextmanager
def _fitting() -> Iterator[None]:
    """Turns the device's want of memory into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device's memory is too small: {first_line(error)}; expected smaller batches, "
            "more config.accumulation, or another config.remat"
        ) from error


def _peer(name: str) -> Peer:
    """The function of MODULE:FUNCTION.

    Raises:
      UserError: there is none, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"--peer {name}; expected MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever a module raises while it is imported
        raise UserError(
            f"--peer {name}: {type(error).__name__}: {first_line(error)}; expected a module on the "
            'Python path whose libraries are installed, as by pip install "dmd_jax[torch]"'
        ) from error
    if not callable(found):
        raise UserError(f"--peer {name}: {module} has no function {function}; expected one")
    return found
