"""`dmd-jax sample`: images from weights, of classes, of none or of text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dmd_jax.commands.arguments import (
    add_sampler_arguments,
    image_settings,
    load_images,
    make_images,
    refuse,
)
from dmd_jax.data.prompt_rows import BrokenRow, PromptRows
from dmd_jax.errors import UserError, first_line
from dmd_jax.evaluation.collect import Counter
from dmd_jax.evaluation.parts import claim
from dmd_jax.reporting.pictures import png_bytes, to_uint8
from dmd_jax.reporting.sample_files import read_latents, write_images
from dmd_jax.sampling.draws import draw_latents
from dmd_jax.sampling.maker import ImageMaker, tokens_of
from dmd_jax.storage.files import local_path, write_whole
from dmd_jax.storage.weights import network_of
from dmd_jax.teachers.families import family_of
from dmd_jax.teachers.family import Pipeline
from dmd_jax.teachers.teacher import Tokens

_PROMPTS_FILE = "prompts.txt"
_NUM = 64


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
    with_text = family_of(network_of(args.weights)).takes == "text"
    _check_arguments(args, with_text)
    prompts = read_prompts(args.prompts, args.prompt) if with_text else []
    pipeline = load_images(args, labels=["labels"], text=["prompts", "prompt"])
    z = None if args.latents is None else _read_latents(args, pipeline, len(prompts))
    count = args.num or len(prompts if z is None else z) or _NUM
    prompts = [prompts[index % len(prompts)] for index in range(count)] if prompts else []
    if "s_churn" not in pipeline.family.arguments and args.sampler != "few-step":
        # A batch that has fewer rows is filled up, for nothing where it is the only one. Noise
        # that a sampler adds is drawn for the batch as a whole, so there its size is left alone.
        args.batch_size = min(args.batch_size, count)
    maker = make_images(args, pipeline, None if z is None else z.shape[1:])
    if prompts:
        tokens = tokens_of(pipeline, prompts)
    else:
        labels = parse_labels(args.labels, maker.num_classes, count)
        tokens = {} if labels is None else {"label": labels}
    folder = None if args.out.suffix else args.out
    files = [] if folder is None else [folder / f"{index:05d}.png" for index in range(count)]
    if folder is not None:
        settings = image_settings(args, pipeline, maker, z, tokens)
        claim(folder, settings, others="images of other settings")
        _write(folder / _PROMPTS_FILE, _lines(prompts))
    images = []
    for rows, part in _made(args, maker, z, tokens, count, files):
        if folder is None:
            images.append(part)
        else:
            for path, image in zip(files[rows], part):
                _write(path, png_bytes(to_uint8(image)))
    if folder is None:
        write_images(args.out, np.concatenate(images))
    print(f"sample: {count:,} images in {args.out}")


def _check_arguments(args: argparse.Namespace, with_text: bool) -> None:
    suffixes, expected = (".png", ".npy"), "a name that ends in .png or .npy"
    if with_text:
        suffixes, expected = (*suffixes, ""), f"{expected}, or a folder's, without a suffix"
    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: expected {expected}")
    if args.num is not None and args.num < 1:
        raise UserError(f"--num {args.num}; expected at least 1")


def _read_latents(args: argparse.Namespace, pipeline: Pipeline, num_prompts: int) -> np.ndarray:
    """The latents of --latents, at least one for each prompt."""
    refuse(args, ["height", "width"], f"--latents {args.latents} has a size of its own")
    shape = pipeline.teacher.sample_shape
    if "height" in pipeline.family.arguments:
        shape = ("h", "w", shape[-1])
    z = read_latents(args.latents, shape, args.num)
    if args.num is None and len(z) < num_prompts:
        raise UserError(
            f"--latents {args.latents} holds {len(z)} latents; expected at least one for each "
            f"of the {num_prompts:,} prompts"
        )
    return z


def _made(
    args: argparse.Namespace,
    maker: ImageMaker,
    z: np.ndarray | None,
    tokens: Tokens,
    count: int,
    files: Sequence[Path],
) -> Iterator[tuple[slice, np.ndarray]]:
    """The images batch by batch with their rows, those left out whose files are all there."""
    starts = range(0, count, maker.batch_size)
    batches = [slice(start, min(start + maker.batch_size, count)) for start in starts]
    missing = [
        rows for rows in batches if not files or not all(path.exists() for path in files[rows])
    ]
    counter = Counter("sample")
    counter.start(count - sum(rows.stop - rows.start for rows in missing), count)
    for rows in missing:
        if z is None:
            noise = draw_latents(args.seed, rows.start, rows.stop, maker.sample_shape)
        else:
            noise = z[rows]
        own = {name: array[rows] for name, array in tokens.items()}
        part = maker(noise, own, seed=args.seed, first=rows.start)
        yield rows, part
        if len(batches) > 1:
            counter.add(len(part))


def read_prompts(path: Path | None, given: Sequence[str] | None) -> list[str]:
    """The prompts of a file as `dmd-jax prompts` takes it, or those that are given.

    Raises:
      UserError: neither or both; a file that cannot be read or has none, or broken rows.
    """
    if (path is None) == (given is None):
        raise UserError("text-to-image weights need prompts; expected --prompts FILE or --prompt")
    if given is not None:
        return list(given)
    prompts, broken = [], []
    for row in PromptRows(path):
        if isinstance(row, BrokenRow):
            broken.append(row)
        else:
            prompts.append(row.decode())
    if broken:
        raise UserError(
            f"--prompts {path}: {len(broken):,} of {len(prompts) + len(broken):,} rows are broken, "
            f"the first is {broken[0].where}: {broken[0].problem}"
        )
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompts, expected at least one row")
    return prompts


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


def _lines(prompts: Sequence[str]) -> bytes:
    """One prompt a line, with line breaks inside a prompt as spaces."""
    return "".join(" ".join(prompt.splitlines()) + "\n" for prompt in prompts).encode()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {first_line(error)}; finished images are kept: run the "
            "same command when that is put right"
        ) from error
