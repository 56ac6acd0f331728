"""Arguments that several commands share, and what they set up."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dmd_jax.config import flatten, resolve_config
from dmd_jax.errors import UserError
from dmd_jax.method.precision import PRECISIONS
from dmd_jax.models import DTYPES
from dmd_jax.parallel.processes import join_processes
from dmd_jax.sampling.draws import DRAWS
from dmd_jax.sampling.maker import (
    ImageMaker,
    generator_sampler_of,
    image_shape,
    steps_of,
)
from dmd_jax.storage.files import path_of, write_json
from dmd_jax.storage.weights import generator_of, network_of
from dmd_jax.teachers.families import FAMILIES, family_of, load_pipeline
from dmd_jax.teachers.family import GENERATORS, Pipeline
from dmd_jax.teachers.teacher import Tokens
from dmd_jax.teachers.text_parts import DECODERS

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
        type=path_of,
        help="where the run lives; given alone, the run there goes on",
    )
    add_process_arguments(parser)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that join several processes to one run."""
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


def write_results(path: Path, results: Any) -> None:
    """Writes what --json asks for.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        write_json(path, results)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error}") from error


def run_config(args: argparse.Namespace, command: str) -> ConfigDict:
    """The config of --config, --workdir and the overrides, on which all processes agree."""

    def prepare() -> tuple[ConfigDict, dict[str, Any]]:
        config = resolve_config(args.config, args.overrides, args.workdir, command=command)
        values = {f"config.{key}": value for key, value in flatten(config.to_dict()).items()}
        return config, {"command": command, **values}

    return join_processes(args, prepare, workdir=args.workdir)


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, and how to make images from them."""
    parser.add_argument(
        "--weights",
        type=path_of,
        required=True,
        metavar="DIR",
        help="a weights folder or a workdir",
    )
    parser.add_argument(
        "--sampler",
        choices=tuple(dict.fromkeys(name for one in FAMILIES for name in one.samplers)),
        help="one-step and few-step are for generators; heun and euler for images of classes or of "
        "none, the rest for those of text (default: the generator's own, one-step for a teacher)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of all samplers but one-step (default: 18; of text 50; of few-step the generator's)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="images at a time (default: 256; of text 8)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="that the networks compute in"
    )
    parser.add_argument(
        "--matmul-precision",
        choices=PRECISIONS,
        default="highest",
        help="of float32 products on TPU and GPU (default: highest, which is float32)",
    )
    for name, text in SAMPLER_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="X", help=f"heun and euler: {text}")
    group = parser.add_argument_group("images of text")
    group.add_argument(
        "--parts",
        type=path_of,
        metavar="DIR",
        help="where the text encoder, the decoder and the tokenizer are (default: with the "
        "weights, or with the teacher of their run)",
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="classifier-free, by the empty prompt; 1 is none (default: 7.5; of a generator 1)",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        help="of latents to images: vae (the default), or taesd, which is fast",
    )
    group.add_argument("--height", type=int, metavar="H", help="in pixels")
    group.add_argument("--width", type=int, metavar="W", help="(default: as in training)")


def load_images(args: argparse.Namespace, **own: Iterable[str]) -> Pipeline:
    """What the shared arguments have images made with.

    Defaults that depend on the family of the weights are filled in in `args`.

    Args:
      own: arguments of the command itself, by what the family has to take for them.

    Raises:
      UserError: an argument that is impossible, or that is of another family or sampler.
    """
    family = family_of(network_of(args.weights))
    foreign = [name for one in FAMILIES if one is not family for name in one.arguments]
    foreign += [name for takes, names in own.items() if takes != family.takes for name in names]
    refuse(args, foreign, f"{args.weights} are {family.weights_are}")
    defaults, asked = dict(family.defaults), generator_of(args.weights)
    args.sampler = args.sampler or generator_sampler_of(asked)
    defaults["steps"] = steps_of(args.sampler, asked, defaults["steps"])
    if args.sampler == "one-step":
        refuse(args, ["steps"], "the sampler is one-step")
    if args.sampler in GENERATORS and "guidance" in defaults:
        defaults["guidance"] = 1.0
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}; expected at least 1")
    return load_pipeline(
        args.weights,
        parts=args.parts,
        decoder=args.decoder,
        dtype=args.dtype,
        precision=args.matmul_precision,
    )


def make_images(
    args: argparse.Namespace,
    pipeline: Pipeline,
    sample_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> ImageMaker:
    """The maker that the shared arguments ask for.

    Args:
      sample_shape: of one x0, where something else than --height and --width decides it.
      options: of ImageMaker, in place of what the arguments say.

    Raises:
      UserError: an argument that is impossible.
    """
    given = {name: getattr(args, name) for name in SAMPLER_OPTIONS}
    asked = {
        "sampler": args.sampler,
        "num_steps": args.steps,
        "guidance": 1.0 if args.guidance is None else args.guidance,
        "batch_size": args.batch_size,
        "options": {name: value for name, value in given.items() if value is not None},
        "sample_shape": sample_shape or _sample_shape(args, pipeline),
    }
    return ImageMaker(pipeline, **asked | options)


def image_settings(
    args: argparse.Namespace,
    pipeline: Pipeline,
    maker: ImageMaker,
    z: np.ndarray | None,
    tokens: Tokens,
) -> dict[str, Any]:
    """All that images of text depend on, JSON-able.

    Args:
      z: their latents, None where the seed draws these.
    """
    one_step = args.sampler == "one-step"
    return pipeline.identity() | {
        "sampler": args.sampler,
        "noise_batch_size": maker.noise_batch_size,
        "num_steps": 1 if one_step else args.steps,
        "sampling": None if args.sampler in GENERATORS else pipeline.sampling,
        "guidance": args.guidance,
        "dtype": args.dtype,
        "matmul_precision": args.matmul_precision,
        "image_shape": maker.image_shape,
        "tokens_sha256": _sha256(*tokens.values()),
        "seed": args.seed if z is None else None,
        "draws": DRAWS if z is None else None,
        "latents_sha256": None if z is None else _sha256(z),
    }


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises a UserError that says why if any of these arguments is given."""
    for name in names:
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} is given, but {why}; expected none")


def _sample_shape(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, ...]:
    """That of --height and --width, or of the network's training."""
    shape = pipeline.teacher.sample_shape
    if args.height is None and args.width is None:
        return shape
    *sides, channels = shape
    # How many pixels a side of a latent stands for: 8 in Stable Diffusion.
    factor = image_shape(pipeline.teacher, pipeline.frozen, (1, 1, channels))[0]
    for axis, name in enumerate(("height", "width")):
        pixels = getattr(args, name)
        if pixels is None:
            continue
        if pixels < factor or pixels % factor:
            raise UserError(f"--{name} {pixels}; expected a multiple of {factor}")
        sides[axis] = pixels // factor
    return *sides, channels


def _sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
