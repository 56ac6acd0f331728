"""`dmd-jax evaluate`: the Fréchet distance of a model's samples to real images."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from dmd_jax.arguments import add_sampler_arguments, make_images
from dmd_jax.data.images import open_images
from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import FeatureExtractor, feature_extractor
from dmd_jax.evaluation.frechet import Statistics, frechet_distance, gather
from dmd_jax.files import replacing, write_json
from dmd_jax.generation import draw_labels, draw_latents
from dmd_jax.metrics import Progress
from dmd_jax.provenance import command_line, machine

REFERENCE_BATCH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampler_arguments(parser)
    parser.add_argument(
        "--reference",
        required=True,
        metavar="IMAGES",
        help="real images: digits, a folder or zip of PNGs, an .npz, idx files, tfds:NAME:SPLIT",
    )
    parser.add_argument(
        "--features",
        default="pixels",
        metavar="NAME",
        help="pixels, for tiny images, or package.module:function (images [N, H, W, C] -> [N, D])",
    )
    parser.add_argument("--num", type=int, default=10_000, metavar="N", help="samples to make")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--samples", type=Path, metavar="FILE.npz", help="keep images and labels")


def run(args: argparse.Namespace) -> None:
    if args.num < 2:
        raise UserError(f"--num {args.num}; expected at least 2 samples")
    for name, suffix in (("out", ".json"), ("samples", ".npz")):
        path = getattr(args, name)
        if path is not None and path.suffix != suffix:
            raise UserError(f"--{name} {path}: expected a name that ends in {suffix}")
    features = feature_extractor(args.features)
    maker, description = make_images(args)
    reference = open_images(args.reference, resolution=maker.sample_shape[0])
    if reference.sample_shape != maker.sample_shape:
        raise UserError(
            f"--reference {args.reference} has images of shape {reference.sample_shape}; "
            f"expected {maker.sample_shape} as --weights {args.weights} makes"
        )
    z = draw_latents(args.seed, 0, args.num, maker.sample_shape)
    labels = draw_labels(args.seed, 0, args.num, maker.num_classes)
    maker(z[:1], labels[:1])  # compiles, which is not an image's time
    started = time.perf_counter()
    progress = Progress("evaluate", args.num)
    images = []
    for batch in maker.batches(z, labels, seed=args.seed):
        images.append(batch)
        progress.update(sum(map(len, images)))
    seconds = (time.perf_counter() - started) / args.num
    images = np.concatenate(images)
    results = {
        "frechet_distance": frechet_distance(
            Statistics.of(features(images)), reference_statistics(reference, features)
        ),
        "features": args.features,
        "reference": args.reference,
        "num_samples": args.num,
        "sampler": args.sampler,
        "num_steps": 1 if args.sampler == "one-step" else args.steps,
        "seed": args.seed,
        "seconds_per_image": seconds,
        "weights": description,
        "command": command_line(),
        "machine": machine(),
    }
    try:
        write_json(args.out, results)
        if args.samples:
            with replacing(args.samples) as temporary, temporary.open("wb") as file:
                np.savez(file, images=images, labels=labels)
    except OSError as error:
        raise UserError(f"results cannot be written: {error}") from error
    print(f"evaluate: Fréchet distance {results['frechet_distance']:.4f} in {args.out}")


def reference_statistics(reference, features: FeatureExtractor) -> Statistics:
    """The features' statistics over all real images."""

    def batches():
        for start in range(0, len(reference), REFERENCE_BATCH):
            stop = min(start + REFERENCE_BATCH, len(reference))
            yield features(np.stack([reference[index]["x0"] for index in range(start, stop)]))

    return gather(batches())
