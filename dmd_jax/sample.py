"""`dmd-jax sample`: images from weights, of classes here and of text in sample_text.py."""

from __future__ import annotations

import argparse

import numpy as np

from dmd_jax.arguments import add_sampler_arguments, make_images, refuse
from dmd_jax.errors import UserError
from dmd_jax.files import local_path
from dmd_jax.generation import draw_latents
from dmd_jax.sample_files import read_latents, write_images
from dmd_jax.sample_text import sample_text
from dmd_jax.text_to_image import is_text_to_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampler_arguments(parser)
    parser.add_argument(
        "--prompts",
        type=local_path,
        metavar="FILE",
        help="for images of text: a prompt a line, or another kind that `dmd-jax prompts` takes",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="likewise; may be given several times"
    )
    parser.add_argument(
        "--latents",
        metavar="Z.npy",
        type=local_path,
        help="float [N, H, W, C], instead of the seed's",
    )
    parser.add_argument(
        "--labels", metavar="0,1,2", help="classes, repeated to the number; default: all in turn"
    )
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help="how many images (default: 64; of text one for each prompt), prompts in turn",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="FILE|FOLDER",
        help="a .png grid, or an .npy of float32 [N, H, W, C] in [-1, 1]; of text also a folder "
        "of one PNG a prompt, which goes on where it was stopped",
    )


def run(args: argparse.Namespace) -> None:
    suffixes, expected = (".png", ".npy"), "a name that ends in .png or .npy"
    of_text = is_text_to_image(args.weights)
    if of_text:
        suffixes, expected = (*suffixes, ""), f"{expected}, or a folder's, without a suffix"
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: expected {expected}")
    if args.num is not None and args.num < 1:
        raise UserError(f"--num {args.num}; expected at least 1")
    if of_text:
        sample_text(args)
    else:
        _sample(args)


def _sample(args: argparse.Namespace) -> None:
    refuse(args, ("prompts", "prompt"), f"{args.weights} are no text-to-image weights")
    maker, _ = make_images(args)
    if args.latents is None:
        z = draw_latents(args.seed, 0, args.num or 64, maker.sample_shape)
    else:
        z = read_latents(args.latents, maker.sample_shape, args.num)
    labels = parse_labels(args.labels, maker.num_classes, len(z))
    images = maker(z, labels, seed=args.seed)
    write_images(args.out, images)
    print(f"sample: {len(images):,} images in {args.out}")


def parse_labels(text: str | None, num_classes: int, count: int) -> np.ndarray | None:
    """Labels int32 [count] from "0,1,2", repeated; all classes in turn if None.

    Raises:
      UserError: not numbers, out of range, or the model has no classes.
    """
    if num_classes == 0:
        if text is not None:
            raise UserError(f"--labels {text}: the model is unconditional; expected none")
        return None
    if text is None:
        return np.arange(count, dtype=np.int32) % num_classes
    try:
        labels = np.array([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UserError(f"--labels {text}: expected numbers such as 0,1,2") from error
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise UserError(f"--labels {text}: {wrong[0]} is out of range 0..{num_classes - 1}")
    return np.resize(labels, count).astype(np.int32)
