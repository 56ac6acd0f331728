"""What `dmd-jax evaluate` is of: samples of classes or none, or images of COCO's captions."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dmd_jax.commands.arguments import (
    SAMPLER_OPTIONS,
    image_settings,
    load_images,
    make_images,
    refuse,
)
from dmd_jax.errors import UserError
from dmd_jax.evaluation.clip_score import ClipScore, score
from dmd_jax.evaluation.coco import read_captions
from dmd_jax.evaluation.collect import Counter
from dmd_jax.evaluation.latency import WARM_UP, latency
from dmd_jax.evaluation.parts import Rows
from dmd_jax.evaluation.protocols import Conventions
from dmd_jax.evaluation.samples import Samples
from dmd_jax.models import complete
from dmd_jax.reporting.pictures import to_uint8
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.sampling.maker import tokens_of
from dmd_jax.storage.files import local_path
from dmd_jax.storage.weights import network_of
from dmd_jax.teachers.families import family_of
from dmd_jax.teachers.family import Pipeline
from dmd_jax.teachers.teacher import Tokens

RESIZE = 256  # pixels; of Stable Diffusion's 512, in the published evaluations
# The command's own arguments, by what weights take for them.
_OWN = {"labels": ("labels",), "text": ("coco", "clip", "clip_prefix", "resize", "latency")}


class Subject(NamedTuple):
    """What an evaluation is of."""

    samples: Samples
    settings: dict[str, Any]  # what the samples depend on, JSON-able
    results: dict[str, Any]  # what their results say of that
    description: str  # of the weights
    figures: Callable[[Rows], dict[str, Any]]  # of the rows, besides those of features


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """What the evaluation of text-to-image weights takes besides."""
    group = parser.add_argument_group("images of text, judged as those of COCO's captions")
    group.add_argument(
        "--coco",
        type=local_path,
        metavar="CAPTIONS",
        help="COCO's captions .json, of which one an image is taken, or a .txt of a caption a "
        "line; --num of them, evenly spread",
    )
    group.add_argument(
        "--clip",
        type=local_path,
        metavar="DIR",
        help="of `dmd-jax convert clip`: adds the CLIP score; its vision tower, 7.4 GB of bigG, is "
        "on each device beside what makes images",
    )
    group.add_argument(
        "--resize",
        type=int,
        metavar="R",
        help="pixels of a side that images have when they are judged, Lanczos in PIL; 0 leaves "
        f"them (default: {RESIZE})",
    )
    group.add_argument(
        "--latency",
        type=int,
        metavar="N",
        help="adds the latency of one image, from text to pixels on one device, of N images",
    )


def subject_of(args: argparse.Namespace, conventions: Conventions) -> Subject:
    """What the arguments have evaluated; defaults are filled in in `args`.

    Args:
      conventions: of the protocol.

    Raises:
      UserError: an argument that is impossible, or a part that is not what it should be.
    """
    if family_of(network_of(args.weights)).takes == "labels":
        return _labelled(args, conventions)
    if args.coco is None:
        raise UserError(f"{args.weights} are text-to-image weights; expected --coco CAPTIONS")
    return _captioned(args, conventions)


def _labelled(args: argparse.Namespace, conventions: Conventions) -> Subject:
    """Samples of a class-conditional or unconditional model."""
    pipeline = load_images(args, **_OWN)
    maker = make_images(args, pipeline)
    classes, weights = maker.num_classes, pipeline.weights

    def labels(start: int, stop: int) -> Tokens:
        if conventions.labels == "balanced":
            return {"label": np.arange(start, stop, dtype=np.int32) % max(classes, 1)}
        return {"label": draw_labels(args.seed, start, stop, classes)}

    settings = pipeline.identity() | {
        "network": complete(weights.network),
        "sampler_options": {name: getattr(args, name) for name in SAMPLER_OPTIONS},
        "noise_batch_size": maker.noise_batch_size,
        "labels": conventions.labels,
        "bytes": conventions.bytes,
    }
    samples = Samples(
        maker, labels, seed=args.seed, kept={"label": "labels"}, bytes_rule=conventions.bytes
    )
    names = {"class_names": weights.class_names} if weights.class_names else {}
    return Subject(samples, settings, names, weights.description, lambda rows: {})


def _captioned(args: argparse.Namespace, conventions: Conventions) -> Subject:
    """Images of captions, an image each."""
    if args.clip is None:
        refuse(args, ["clip_prefix"], "there is no --clip")
    args.resize = RESIZE if args.resize is None else args.resize
    if args.resize < 0:
        raise UserError(f"--resize {args.resize}; expected pixels, or 0")
    if args.latency is not None and args.latency < 1:
        raise UserError(f"--latency {args.latency}; expected at least 1 image")
    captions = read_captions(args.coco, args.num)
    clip = None if args.clip is None else ClipScore(args.clip)
    prefix = conventions.clip_prefix
    clip_tokens = None if clip is None else clip.tokens([prefix + text for text in captions])
    pipeline = load_images(args, **_OWN)
    maker = make_images(args, pipeline)
    tokens = tokens_of(pipeline, captions)
    samples = Samples(
        maker,
        lambda start, stop: {name: array[start:stop] for name, array in tokens.items()},
        seed=args.seed,
        kept={name: name for name in tokens},
        resize=args.resize,
        clip=clip,
        clip_tokens=clip_tokens,
        bytes_rule=conventions.bytes,
    )
    origin = None if clip is None else clip.origin
    captions_sha256 = hashlib.sha256("\0".join(captions).encode()).hexdigest()
    settings = image_settings(args, pipeline, maker, None, tokens) | {
        "network": complete(pipeline.weights.network),
        "batch_size": args.batch_size,
        "resize": args.resize,
        "captions_sha256": captions_sha256,
        "bytes": conventions.bytes,
        "clip": None if origin is None else origin["sha256"],
        "clip_prefix": None if origin is None else prefix,
    }
    results = {
        "captions": {"file": str(args.coco), "sha256": captions_sha256},
        "guidance": args.guidance,
        "decoder": args.decoder,
        "image_shape": list(maker.image_shape),
        "resize": args.resize,
    }

    shape = maker.sample_shape

    def figures(rows: Rows) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if origin is not None:
            cosines = np.concatenate([part for (part,) in rows.read("cosine")])
            found["clip"] = score(cosines) | {"prefix": prefix, "origin": origin}
        if args.latency is not None:
            samples.let_go()
            found["latency"] = _latency(args, pipeline, captions, shape)
        return found

    return Subject(samples, settings, results, pipeline.weights.description, figures)


def _latency(
    args: argparse.Namespace,
    pipeline: Pipeline,
    captions: Sequence[str],
    sample_shape: tuple[int, ...],
) -> dict[str, Any]:
    """From a caption to the bytes of its image on the host, one at a time on one device."""
    one = {"batch_size": 1, "devices": jax.local_devices()[:1]}
    maker = make_images(args, pipeline, sample_shape, **one)
    counter = Counter("latency")
    counter.start(0, WARM_UP + args.latency)

    def make(index: int) -> None:
        tokens = pipeline.tokens([captions[index % len(captions)]])
        z = draw_latents(args.seed, index, index + 1, sample_shape)
        to_uint8(maker(z, tokens))
        counter.add(1)

    return latency(make, args.latency)
