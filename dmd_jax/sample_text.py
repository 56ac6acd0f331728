"""`dmd-jax sample` where images are made of text."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmd_jax.arguments import make_latents, refuse
from dmd_jax.data.prompt_rows import BrokenRow, PromptRows
from dmd_jax.errors import UserError, first_line
from dmd_jax.evaluation.collect import Counter
from dmd_jax.evaluation.parts import claim
from dmd_jax.files import write_whole
from dmd_jax.generation import DRAWS, draw_latents
from dmd_jax.models import complete
from dmd_jax.models.clip_text import check_tokens
from dmd_jax.pictures import png_bytes, to_uint8
from dmd_jax.sample_files import read_latents, write_images
from dmd_jax.text_to_image import LatentMaker, Pipeline
from dmd_jax.tokenizer import Tokenizer
from dmd_jax.weights import network_of, params_sha256

log = logging.getLogger(__name__)

_PROMPTS_FILE = "prompts.txt"


def sample_text(args: argparse.Namespace) -> None:
    """Makes an image of each prompt, or as many as asked for, with the prompts in turn."""
    refuse(args, ["labels"], f"{args.weights} are text-to-image weights")
    prompts = read_prompts(args.prompts, args.prompt)
    z = latent_shape = None
    if args.latents is not None:
        refuse(args, ["height", "width"], f"--latents {args.latents} has a size of its own")
        channels = complete(network_of(args.weights))["in_channels"]
        z = read_latents(args.latents, ("h", "w", channels), args.num)
        latent_shape = z.shape[1:]
        if args.num is None and len(z) < len(prompts):
            raise UserError(
                f"--latents {args.latents} holds {len(z)} latents; expected at least one for each "
                f"of the {len(prompts):,} prompts"
            )
    count = args.num or len(prompts if z is None else z)
    prompts = [prompts[index % len(prompts)] for index in range(count)]
    # A batch that has fewer rows is filled up, for nothing where it is the only one.
    args.batch_size = min(8 if args.batch_size is None else args.batch_size, count)
    maker, pipeline = make_latents(args, latent_shape)
    tokens = encode(pipeline.tokenizer, prompts)
    check_tokens(tokens, complete(pipeline.text_encoder.network)["vocab_size"])

    folder = None if args.out.suffix else args.out
    files = [] if folder is None else [folder / f"{index:05d}.png" for index in range(count)]
    if folder is not None:
        settings = image_settings(args, pipeline, maker, z, tokens)
        claim(folder, settings, others="images of other settings")
        _write(folder / _PROMPTS_FILE, _lines(prompts))
    starts = range(0, count, maker.batch_size)
    batches = [slice(start, min(start + maker.batch_size, count)) for start in starts]
    missing = [
        rows for rows in batches if not files or not all(path.exists() for path in files[rows])
    ]
    counter, images = Counter("sample"), []
    counter.start(count - sum(rows.stop - rows.start for rows in missing), count)
    for rows in missing:
        if z is None:
            noise = draw_latents(args.seed, rows.start, rows.stop, maker.latent_shape)
        else:
            noise = z[rows]
        part = maker.decode(maker(noise, tokens[rows]))
        if folder is None:
            images.append(part)
        else:
            for path, image in zip(files[rows], part):
                _write(path, png_bytes(to_uint8(image)))
        if len(batches) > 1:
            counter.add(len(part))
    if folder is None:
        write_images(args.out, np.concatenate(images))
    print(f"sample: {count:,} images in {args.out}")


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


def encode(tokenizer: Tokenizer, prompts: Sequence[str]) -> np.ndarray:
    """The tokens of prompts, int32 [N, L]; warns where some are cut.

    Raises:
      UserError: as Tokenizer.encode.
    """
    cut = np.flatnonzero(tokenizer.truncated(prompts))
    if len(cut):
        log.warning(
            "%d of %d prompts have more than %d tokens and are cut, the first is number %d",
            *(len(cut), len(prompts), tokenizer.max_length, cut[0] + 1),
        )
    return tokenizer.encode(prompts)


def image_settings(
    args: argparse.Namespace,
    pipeline: Pipeline,
    maker: LatentMaker,
    z: np.ndarray | None,
    tokens: np.ndarray,
) -> dict:
    """All that the images depend on, JSON-able."""
    one_step = args.sampler == "one-step"
    return {
        "unet_sha256": params_sha256(pipeline.unet.params),
        "text_encoder_sha256": params_sha256(pipeline.text_encoder.params),
        "decoder_sha256": params_sha256(pipeline.decoder.params),
        "sampler": args.sampler,
        "num_steps": 1 if one_step else args.steps,
        "sampling": None if one_step else pipeline.sampling,
        "guidance": args.guidance,
        "dtype": args.dtype,
        "matmul_precision": args.matmul_precision,
        "image_shape": maker.image_shape,
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "seed": args.seed if z is None else None,
        "draws": DRAWS if z is None else None,
        "latents_sha256": None if z is None else hashlib.sha256(z.tobytes()).hexdigest(),
    }


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
