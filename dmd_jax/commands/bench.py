"""`dmd-jax bench`: how fast a config's step or its images are here, and beside PyTorch."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.commands.arguments import add_process_arguments
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
from dmd_jax.storage.files import local_path, write_json
from dmd_jax.teachers.text_parts import DECODERS

# Name -> whether it goes through torch.compile.
PEERS = {"torch": False, "torch-compile": True}
_TORCH = ("torch", "diffusers", "transformers")  # what peers import


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
        choices=tuple(PEERS),
        action="append",
        default=[],
        help="the same in PyTorch, eager or compiled, in turns with ours; may be given twice",
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

    if args.peer:
        _check_torch()
        # JAX would else take three quarters of a GPU's memory before PyTorch gets any.
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
        "heats": [run_heat(heat, args.steps, **options) for heat in _heats(config, args)],
    }
    if jax.process_index() == 0:
        print(table(results))
        if args.json is not None:
            _write(args.json, results)


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(f"bench: {line}", file=sys.stderr, flush=True)


def _heats(config: ConfigDict, args: argparse.Namespace) -> Iterator[Heat]:
    """One after the other, so that each has the devices for itself."""
    if args.what == "train":
        mesh = mesh_of(config)
        check_batches(config, mesh, "config")
        yield _step_heat(config, mesh, args.peer)
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
        options = {"count": count, "decoder": decoder, "devices": devices}
        yield _images_heat(config, args.peer, options)


def _step_heat(config: ConfigDict, mesh: Mesh, names: Sequence[str]) -> Heat:
    own, peers = OwnStep(config, mesh), {}
    if names:
        from dmd_jax.performance.benchmark.torch_peers import step_peer

        peers = _named(names, step_peer(config, own))
    return Heat("training step", own.images, own.flops, functools.partial(_rival, own), peers)


def _images_heat(config: ConfigDict, names: Sequence[str], options: dict[str, Any]) -> Heat:
    own, peers, decoder = OwnImages(config, **options), {}, options["decoder"]
    if names:
        from dmd_jax.performance.benchmark.torch_peers import images_peer

        peers = _named(names, images_peer(config, own, decoder))
    title = "to pixels in one step" + (f", by {decoder}" if decoder else "")
    return Heat(title, own.images, own.flops, functools.partial(_rival, own), peers)


def _rival(own: OwnStep | OwnImages) -> Rival:
    with _fitting():
        own.prepare()
    return Rival(own, own.facts, own.release)


def _named(names: Sequence[str], make: Callable[[bool], Rival]) -> dict[str, Callable[[], Rival]]:
    return {name: functools.partial(make, PEERS[name]) for name in names}


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


def _check_torch() -> None:
    missing = [name for name in _TORCH if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--peer needs {", ".join(missing)}; expected pip install "dmd_jax[torch]"')


def _write(path: Path, results: dict[str, Any]) -> None:
    try:
        write_json(path, results)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error}") from error
