"""`dmd-jax compile`: the programs of a config by the real compiler, for TPUs that are not here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dmd_jax.commands.arguments import write_results
from dmd_jax.config import load_config
from dmd_jax.errors import UserError, first_line
from dmd_jax.parallel.sharding import AXES
from dmd_jax.performance.compilation import dumps
from dmd_jax.performance.compilation.figures import early_figures, figures
from dmd_jax.performance.compilation.programs import WHATS, Compilable, compilable
from dmd_jax.performance.compilation.refusal import refusal
from dmd_jax.performance.compilation.table import summary, table
from dmd_jax.performance.compilation.topology import Chip, chip_of, devices_of, virtual_devices
from dmd_jax.reporting.parameters import tell_parameters
from dmd_jax.reporting.provenance import command_line
from dmd_jax.storage.files import local_path
from dmd_jax.storage.untrusted import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="a Python file with get_config(); --config.KEY=VALUE overrides a value; no weights "
        "and no data are read",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology",
        metavar="NAME,…",
        help="a TPU slice such as v5e:16x16, v4:4x4x4, v5p:4x4x4 or v6e:8x8; several, with commas "
        "between them, are compared at the end",
    )
    where.add_argument(
        "--devices", type=int, metavar="N", help="virtual CPU devices, for a quick look"
    )
    where.add_argument(
        "--join",
        type=local_path,
        nargs="+",
        metavar="FILE",
        help="compiles nothing, and prints the table of what --json wrote to these files",
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="of the topology (default: 1)"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        help="data and fsdp, in place of config.mesh; -1 takes the devices left",
    )
    parser.add_argument(
        "--per-device",
        type=int,
        metavar="N",
        help="images of a step for each device, in place of config.batch_size, with pairs in "
        "proportion",
    )
    parser.add_argument(
        "--what",
        choices=WHATS,
        default="train",
        help="train: the step; pairs: the teacher's sampler, a batch on one host's devices; "
        "sample: the one-step generator likewise (default: train)",
    )
    parser.add_argument(
        "--until-memory",
        action="store_true",
        help="ends once the memory is known, before the machine code is made: in a fraction of the "
        "time, and without an estimate of the step's",
    )
    parser.add_argument(
        "--dump", type=local_path, metavar="DIR", help="what XLA writes of the program, as text"
    )
    parser.add_argument("--json", type=local_path, metavar="FILE", help="all figures, for programs")


def run(args: argparse.Namespace) -> None:
    if args.join:
        print(summary([result for path in args.join for result in _results_of(path)]))
        return
    if args.config is None:
        raise UserError("no --config; expected the Python file of an experiment")
    if args.slices < 1:
        raise UserError(f"--slices {args.slices}; expected at least 1")
    if args.until_memory and not args.topology:
        raise UserError("--until-memory is the TPU compiler's; expected --topology as well")
    # Of a program from the cache XLA writes nothing.
    jax.config.update("jax_enable_compilation_cache", False)
    topologies = args.topology.split(",") if args.topology else [None]
    for topology in filter(None, topologies):
        chip_of(topology)  # the last must not be found wanting after an hour
    results = []
    for topology in topologies:
        results.append(_one(args, topology))
        print(table(results[-1]), end="\n\n", flush=True)
        if args.json is not None:
            write_results(args.json, results)
    if len(results) > 1:
        print(summary(results))
    if not all(result.get("fits", True) for result in results):
        sys.exit(1)


def _results_of(path: Path) -> list[dict[str, Any]]:
    """What --json wrote.

    Raises:
      UserError: it is not there, or something else.
    """
    try:
        results = read_json(path, "what --json wrote")
        summary(results)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: {first_line(error)}; expected what --json wrote") from None
    return results


def _one(args: argparse.Namespace, topology: str | None) -> dict[str, Any]:
    """The facts and figures of the program for one topology, or for virtual devices."""
    chip = None
    if topology is None:
        devices = virtual_devices(args.devices)
    else:
        chip, devices = chip_of(topology), devices_of(topology, args.slices)
    config = load_config(args.config, args.overrides)
    if args.mesh:
        config.mesh.update(_mesh(args.mesh))
    if args.per_device is not None:
        _set_batch(config, args.per_device * len(devices))
    program = compilable(config, args.what, devices)
    result = {
        "command": command_line(),
        "config": " ".join([args.config, *args.overrides]),
        "what": args.what,
        "topology": topology or f"{args.devices} virtual CPU devices",
        "slices": args.slices,
    } | program.facts
    if args.dump is None:  # the process of --until-memory has told of them
        tell_parameters("compile", "network", program.params)
    print(f"compile: {args.what} for {result['topology']}, which takes minutes", file=sys.stderr)
    if args.until_memory:
        return result | _until_memory(program, chip, args, topology)
    return result | _compiled(program, chip, args.dump)


def _set_batch(config: ConfigDict, images: int) -> None:
    """A batch of that many images, with pairs in the config's proportion."""
    if "regression_batch_size" in config.objective:
        pairs = config.objective.regression_batch_size / config.batch_size
        config.objective.regression_batch_size = max(round(images * pairs), 1)
    config.batch_size = images


def _compiled(program: Compilable, chip: Chip | None, folder: Path | None) -> dict[str, Any]:
    """The figures, or the compiler's refusal."""
    began = time.perf_counter()
    lowered = program.lower()
    traced = time.perf_counter()
    try:
        compiled = lowered.compile(dumps.compiler_options(folder) if folder else None)
    except jax.errors.JaxRuntimeError as error:
        found = {"fits": False, "refusal": refusal(error)}
    else:
        flops = program.flops() / program.facts["devices"]
        found = figures(compiled, chip, flops=flops, images=program.facts["images"])
    return found | {
        "trace_seconds": traced - began,
        "compile_seconds": time.perf_counter() - traced,
    }


def _until_memory(
    program: Compilable, chip: Chip, args: argparse.Namespace, topology: str
) -> dict[str, Any]:
    """What another process that compiles the same has written before it makes machine code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        again = ["--config", args.config, "--topology", topology, "--what", args.what]
        again += ["--slices", str(args.slices), "--json", str(folder / "result.json")]
        for option in ("mesh", "per_device"):
            if (value := getattr(args, option)) is not None:
                again += [f"--{option.replace('_', '-')}", str(value)]
        command = [sys.executable, "-m", "dmd_jax", "compile", *again, "--dump", str(folder)]
        began = time.perf_counter()
        child = subprocess.Popen([*command, *args.overrides], stdout=subprocess.DEVNULL)
        try:
            flops = program.flops() / program.facts["devices"]
            while (found := dumps.find(folder)) is None and child.poll() is None:
                time.sleep(1)
        finally:
            child.kill()
            child.wait()
        seconds = {"compile_seconds": time.perf_counter() - began}
        if found is not None:
            return early_figures(found, chip, flops=flops) | seconds
        if not (folder / "result.json").exists():
            raise UserError("the compiler ended without a result; expected one, see above")
        return json.loads((folder / "result.json").read_text())[0]


def _mesh(text: str) -> dict[str, int]:
    """ "data=1,fsdp=64" as a dict.

    Raises:
      UserError: it says something else.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh {text}; expected such as data=1,fsdp=64")
        sizes[axis] = int(size)
    return sizes
