"""Arguments that several commands share, and what they set up."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from dmd_jax.config import flatten, resolve_config
from dmd_jax.errors import UserError
from dmd_jax.experiment import check_ranges
from dmd_jax.files import path_of
from dmd_jax.generation import SAMPLERS, ImageMaker
from dmd_jax.models import DTYPES, complete
from dmd_jax.parallel.processes import join_processes
from dmd_jax.precision import PRECISIONS
from dmd_jax.text_parts import DECODERS
from dmd_jax.text_to_image import (
    TEXT_SAMPLERS,
    LatentMaker,
    Pipeline,
    load_pipeline,
    pixels_a_latent,
)
from dmd_jax.weights import Weights, load_weights

# Of heun and euler.
SAMPLER_OPTIONS = {
    "s_churn": "noise added along the way, 0 is deterministic",
    "s_min": "lowest sigma with added noise",
    "s_max": "highest sigma with added noise",
    "s_noise": "factor on the added noise",
}

# Of images of text.
TEXT_OPTIONS = ("parts", "guidance", "decoder", "height", "width")


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


def run_config(args: argparse.Namespace, command: str) -> ConfigDict:
    """The config of --config, --workdir and the overrides, on which all processes agree."""

    def prepare() -> tuple[ConfigDict, dict[str, Any]]:
        config = resolve_config(args.config, args.overrides, args.workdir, command=command)
        check_ranges(config)
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
        choices=tuple(dict.fromkeys((*SAMPLERS, *TEXT_SAMPLERS))),
        default="one-step",
        help="heun and euler are for images of classes or of none, the rest for those of text",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of all samplers but one-step (default: 18; of text 50)",
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
        help="classifier-free, by the empty prompt; 1 is none (default: 7.5; of one-step 1)",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        help="of latents to images: vae (the default), or taesd, which is fast",
    )
    group.add_argument("--height", type=int, metavar="H", help="in pixels")
    group.add_argument("--width", type=int, metavar="W", help="(default: as in training)")


def make_images(args: argparse.Namespace) -> tuple[ImageMaker, Weights]:
    """The image maker that the shared arguments ask for, and its weights.

    Defaults that depend on the kind of weights are filled in in `args`.

    Raises:
      UserError: an argument that is impossible, or that is for images of text or another sampler.
    """
    refuse(args, TEXT_OPTIONS, f"{args.weights} are no text-to-image weights")
    _fill_in(args, steps=18, batch_size=256)
    given = {name: getattr(args, name) for name in SAMPLER_OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    weights = load_weights(args.weights)
    maker = ImageMaker(
        weights,
        sampler=args.sampler,
        num_steps=args.steps,
        batch_size=args.batch_size,
        dtype=args.dtype,
        precision=args.matmul_precision,
        sampler_options=options,
    )
    return maker, weights


def make_latents(
    args: argparse.Namespace, latent_shape: tuple[int, ...] | None = None
) -> tuple[LatentMaker, Pipeline]:
    """The maker of latents that the shared arguments ask for, and its pipeline.

    Defaults that depend on the kind of weights are filled in in `args`.

    Args:
      latent_shape: of one example, where something else than --height and --width decides it.

    Raises:
      UserError: an argument that is impossible, or that is for images of no text or another
        sampler.
    """
    refuse(args, SAMPLER_OPTIONS, f"{args.weights} are text-to-image weights")
    guidance = 1.0 if args.sampler == "one-step" else 7.5
    _fill_in(args, steps=50, batch_size=8, guidance=guidance, decoder=DECODERS[0])
    pipeline = load_pipeline(args.weights, parts=args.parts, decoder=args.decoder)
    maker = LatentMaker(
        pipeline,
        sampler=args.sampler,
        num_steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        dtype=args.dtype,
        precision=args.matmul_precision,
        latent_shape=latent_shape or _latent_shape(args, pipeline),
    )
    return maker, pipeline


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises a UserError that says why if any of these arguments is given."""
    for name in names:
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} is given, but {why}; expected none")


def _fill_in(args: argparse.Namespace, **defaults: Any) -> None:
    if args.sampler == "one-step":
        refuse(args, ["steps"], "the sampler is one-step")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}; expected at least 1")


def _latent_shape(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int, int]:
    """That of --height and --width, or of the UNet's training."""
    network = complete(pipeline.unet.network)
    factor = pixels_a_latent(pipeline.decoder)
    sides = []
    for name in ("height", "width"):
        pixels = getattr(args, name)
        if pixels is None:
            pixels = network["sample_size"] * factor
        if pixels < factor or pixels % factor:
            raise UserError(f"--{name} {pixels}; expected a multiple of {factor}")
        sides.append(pixels // factor)
    return *sides, network["in_channels"]
