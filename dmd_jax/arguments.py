"""Arguments that several commands share, and what they set up."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dmd_jax.config import resolve_config
from dmd_jax.errors import UserError
from dmd_jax.experiment import check_ranges
from dmd_jax.generation import SAMPLERS, ImageMaker
from dmd_jax.models import DTYPES
from dmd_jax.weights import Weights, load_weights

# Of heun and euler.
SAMPLER_OPTIONS = {
    "s_churn": "noise added along the way, 0 is deterministic",
    "s_min": "lowest sigma with added noise",
    "s_max": "highest sigma with added noise",
    "s_noise": "factor on the added noise",
}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --workdir and the flags of a run on several processes."""
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="a Python file with get_config(); --config.KEY=VALUE overrides a value",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        type=Path,
        help="where the run lives; given alone, the run there goes on",
    )
    add_process_arguments(parser)


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


def join_processes(args: argparse.Namespace) -> None:
    """Connects to the other processes if the flags say so.

    Raises:
      UserError: the flags are incomplete, or the coordinator cannot be reached.
    """
    if args.coordinator is None:
        if args.processes is not None or args.process is not None:
            raise UserError("--processes and --process need --coordinator HOST:PORT")
        return
    try:
        if args.coordinator == "auto":
            jax.distributed.initialize()
        elif args.processes is None or args.process is None:
            raise UserError(f"--coordinator {args.coordinator} needs --processes and --process")
        else:
            jax.distributed.initialize(args.coordinator, args.processes, args.process)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator {args.coordinator}: {error}") from error


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process, where what is finished is in files already.

    With several processes JAX's preemption service swallows the signal, for training's sake.
    """
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_config(args: argparse.Namespace, command: str) -> ConfigDict:
    """The config of --config, --workdir and the overrides; joins the processes first."""
    join_processes(args)
    config = resolve_config(args.config, args.overrides, args.workdir, command=command)
    check_ranges(config)
    return config


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, and how to make images from them."""
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="DIR", help="a weights folder or a workdir"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, default="one-step")
    parser.add_argument("--steps", type=int, default=18, metavar="N", help="of heun and euler")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--batch-size", type=int, default=256, metavar="B")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="that the network computes in"
    )
    for name, text in SAMPLER_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="X", help=f"heun and euler: {text}")


def make_images(args: argparse.Namespace) -> tuple[ImageMaker, Weights]:
    """The image maker that the shared arguments ask for, and its weights."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}; expected at least 1")
    given = {name: getattr(args, name) for name in SAMPLER_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    weights = load_weights(args.weights)
    maker = ImageMaker(
        weights,
        sampler=args.sampler,
        num_steps=args.steps,
        batch_size=args.batch_size,
        dtype=args.dtype,
        sampler_options=options,
    )
    return maker, weights
