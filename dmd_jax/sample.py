"""`dmd-jax sample`: images from weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dmd_jax.arguments import add_sampler_arguments, make_images
from dmd_jax.errors import UserError
from dmd_jax.files import replacing
from dmd_jax.generation import draw_latents
from dmd_jax.pictures import grid, save_png, to_uint8, viewing_scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampler_arguments(parser)
    parser.add_argument(
        "--latents", metavar="Z.npy", type=Path, help="float [N, H, W, C], instead of the seed's"
    )
    parser.add_argument(
        "--labels", metavar="0,1,2", help="classes, repeated to the number; default: all in turn"
    )
    parser.add_argument("--num", type=int, metavar="N", help="how many images (default: 64)")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .png grid, or an .npy of float32 [N, H, W, C] in [-1, 1]",
    )


def run(args: argparse.Namespace) -> None:
    if args.out.suffix not in (".png", ".npy"):
        raise UserError(f"--out {args.out}: expected a name that ends in .png or .npy")
    if args.num is not None and args.num < 1:
        raise UserError(f"--num {args.num}; expected at least 1")
    maker, _ = make_images(args)
    if args.latents is None:
        z = draw_latents(args.seed, 0, args.num or 64, maker.sample_shape)
    else:
        z = read_latents(args.latents, maker.sample_shape, args.num)
    labels = parse_labels(args.labels, maker.num_classes, len(z))
    images = maker(z, labels, seed=args.seed)
    _write(args.out, images)
    print(f"sample: {len(images):,} images in {args.out}")


def read_latents(path: Path, sample_shape: tuple[int, ...], num: int | None) -> np.ndarray:
    """The first `num` latents of an .npy file, float32.

    Raises:
      UserError: the file cannot be read, or its shape, type or values are not a latent's.
    """
    try:
        z = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--latents {path} cannot be read: {error}") from error
    expected = f"expected float [N, {', '.join(map(str, sample_shape))}]"
    if not isinstance(z, np.ndarray) or z.shape[1:] != sample_shape or not len(z):
        raise UserError(f"--latents {path} has shape {getattr(z, 'shape', None)}; {expected}")
    if not np.issubdtype(z.dtype, np.floating):
        raise UserError(f"--latents {path} has type {z.dtype}; {expected}")
    if not np.isfinite(z).all():
        raise UserError(f"--latents {path} holds NaN or infinity; expected finite numbers")
    if num is not None and num > len(z):
        raise UserError(f"--latents {path} holds {len(z)} latents; expected --num {num} or more")
    return z[:num].astype(np.float32)


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


def _write(path: Path, images: np.ndarray) -> None:
    try:
        if path.suffix == ".npy":
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, images.astype(np.float32))
            return
        columns = int(np.ceil(np.sqrt(len(images))))
        save_png(path, grid(to_uint8(images), columns, viewing_scale(images.shape[1])))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error}") from error
