"""`dmd-jax evaluate`: the Fréchet distance of a model's samples to real images, and its kin."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax.commands.arguments import add_process_arguments, add_sampler_arguments, refuse
from dmd_jax.commands.evaluate_subject import add_caption_arguments, subject_of
from dmd_jax.errors import UserError
from dmd_jax.evaluation.coco import NUM_CAPTIONS
from dmd_jax.evaluation.collect import reference_rows, sample_rows
from dmd_jax.evaluation.features import RESOLUTION, Features, check_fit, feature_extractor
from dmd_jax.evaluation.kernel_distance import SUBSET_SIZE, SUBSETS
from dmd_jax.evaluation.measures import measure
from dmd_jax.evaluation.parts import Rows, claim, release
from dmd_jax.evaluation.protocols import add_protocol_arguments, protocol_of
from dmd_jax.evaluation.reference import Reference, open_reference, save_reference
from dmd_jax.parallel.processes import join_processes
from dmd_jax.reporting.provenance import command_line, machine
from dmd_jax.sampling.draws import DRAWS
from dmd_jax.storage.files import local_path, path_of, write_json
from dmd_jax.storage.judge_weights import check_free

SAMPLE_PART = 2  # batches
NUM_SAMPLES = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampler_arguments(parser)
    parser.add_argument(
        "--reference",
        required=True,
        metavar="SOURCE",
        help="real images: digits, a folder or zip of images, an .npz, idx files, tfds:NAME:SPLIT; "
        "or statistics: an .npz of mu and sigma, or EDM2's .pkl",
    )
    parser.add_argument(
        "--features",
        action="append",
        metavar="NAME",
        help="may be given several times: pixels (the default, for tiny images), inception (the "
        "default of a --protocol), vgg16, or package.module:function (images [N, H, W, C] -> "
        "[N, D])",
    )
    parser.add_argument(
        "--inception", type=path_of, metavar="FILE", help="of `dmd-jax convert inception`"
    )
    parser.add_argument(
        "--lpips", type=path_of, metavar="FILE", help="of `dmd-jax convert lpips`, for vgg16"
    )
    parser.add_argument(
        "--vgg-resolution",
        type=int,
        metavar="R",
        help=f"pixels that vgg16 resizes images to; 0 leaves them (default: {RESOLUTION})",
    )
    parser.add_argument(
        "--repeat-grey", action="store_true", help="show grey images to networks as three channels"
    )
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help=f"samples to make (default: {NUM_SAMPLES}; with --coco {NUM_CAPTIONS})",
    )
    parser.add_argument(
        "--num-reference", type=int, metavar="N", help="real images, evenly spread (default: all)"
    )
    parser.add_argument(
        "--precision-recall",
        type=int,
        default=10_000,
        metavar="N",
        help="images of each side, at most, for precision and recall; 0 leaves them out "
        "(default: 10000)",
    )
    parser.add_argument(
        "--kid",
        type=int,
        metavar="N",
        help=f"subsets of {SUBSET_SIZE:,} of each side for the kernel distance, which is the KID "
        f"in inception's features; 0 leaves it out (default: {SUBSETS})",
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE.json")
    parser.add_argument(
        "--samples", type=local_path, metavar="FILE.npz", help="keep images and labels, or tokens"
    )
    parser.add_argument(
        "--save-reference",
        type=local_path,
        metavar="FILE.npz",
        help="keep the statistics of the real images, for --reference",
    )
    add_protocol_arguments(parser)
    add_caption_arguments(parser)
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with _warnings_in_a_line():
        _run(args)


def open_judges(
    args: argparse.Namespace, sample_shape: tuple[int, ...]
) -> tuple[list[Features], Reference]:
    """What the arguments measure samples of this shape in, and against.

    Raises:
      UserError: one of them cannot be had, or images do not fit.
    """
    names = _names(args)
    if "inception" not in names:
        refuse(args, ["inception_preprocessing"], f"the features are {', '.join(names)}")
    said = args.protocol is not None or args.inception_preprocessing is not None
    features = [
        feature_extractor(
            name,
            inception=args.inception,
            lpips=args.lpips,
            preprocessing=protocol_of(args).conventions.preprocessing if said else None,
            resolution=args.vgg_resolution,
            repeat_grey=args.repeat_grey,
        )
        for name in names
    ]
    if args.features is None and args.protocol is None:
        features = [one._replace(unsaid="--features NAME") for one in features]
    for one in features:
        check_fit(one, sample_shape)  # before any image is made
    return features, open_reference(args.reference, sample_shape, features, args.num_reference)


def origins(features: list[Features], reference: Reference) -> dict[str, Any]:
    """What they depend on, JSON-able, whatever the names of their files."""
    return {
        "features": {one.name: one.origin for one in features},
        "reference": reference.origin,
    }


def _run(args: argparse.Namespace) -> None:
    names, folder = _names(args), args.out.with_suffix(".parts")
    if args.num is None:
        args.num = NUM_SAMPLES if args.coco is None else NUM_CAPTIONS

    def prepare() -> tuple[None, dict[str, Any]]:
        _check_arguments(args, names)
        _check_outputs(args, folder)
        given = {name: str(value) for name, value in vars(args).items() if name != "process"}
        return None, {"command": "evaluate", **given}

    join_processes(args, prepare)
    protocol = protocol_of(args)
    subject = subject_of(args, protocol.conventions)
    samples = subject.samples
    features, reference = open_judges(args, samples.sample_shape)
    if reference.images is None:
        _check_without_images(args)
    num_steps = 1 if args.sampler == "one-step" else args.steps
    claim(
        folder,
        {
            **subject.settings,
            "sampler": args.sampler,
            "num_steps": num_steps,
            "seed": args.seed,
            "draws": DRAWS,
            "num_samples": args.num,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "matmul_precision": args.matmul_precision,
            **origins(features, reference),
            "keeps_images": args.samples is not None,
        },
    )
    real = reference_rows(folder, reference, features) if reference.images is not None else None
    rows = sample_rows(
        folder,
        samples,
        features,
        num=args.num,
        part_size=SAMPLE_PART * args.batch_size,
        keep_images=args.samples is not None,
    )
    multihost_utils.sync_global_devices(f"evaluate: parts of {args.out}")
    if jax.process_index() == 0:
        figures, real_statistics = measure(
            features,
            rows,
            real,
            reference.statistics,
            args.precision_recall,
            SUBSETS if args.kid is None else args.kid,
        )
        seconds = float(np.mean(np.concatenate([part for (part,) in rows.read("seconds")])))
        results = {
            "features": figures,
            **subject.figures(rows),
            "reference": args.reference,
            "num_reference": reference.count,
            "num_samples": args.num,
            "sampler": args.sampler,
            "num_steps": num_steps,
            **subject.results,
            "seed": args.seed,
            "protocol": protocol.results(captions=args.coco is not None),
            "dtype": args.dtype,
            "matmul_precision": args.matmul_precision,
            "feature_dtype": "float32",
            "seconds_per_image": seconds,
            "weights": subject.description,
            "command": command_line(),
            "machine": machine(),
        }
        if args.save_reference:
            save_reference(args.save_reference, real_statistics[0], features[0])
        _write(args, results, rows, tuple(samples.kept.values()))
        release(folder, rows, *([real] if real else []))
        print(f"evaluate: {_summary(results)}, protocol {protocol}, in {args.out}")
    multihost_utils.sync_global_devices(f"evaluate: {args.out} written")


def _summary(results: dict[str, Any]) -> str:
    """The figures in a line."""

    def of_features(key: str, shown: Callable[[Any], str]) -> str:
        found = {name: one[key] for name, one in results["features"].items() if key in one}
        return ", ".join(f"{shown(value)} ({name})" for name, value in found.items())

    parts = [f"Fréchet distance {of_features('frechet_distance', '{:.4f}'.format)}"]
    if kernel := of_features("kernel_distance", lambda found: f"{found['mean']:.4g}"):
        parts.append(f"kernel distance {kernel}")
    if "clip" in results:
        parts.append(f"CLIP score {results['clip']['clip_score']:.2f}")
    if "latency" in results:
        parts.append(f"{results['latency']['seconds']['p50']:.3g} s an image")
    return ", ".join([*parts, f"images made in {results['dtype']}"])


def _names(args: argparse.Namespace) -> list[str]:
    default = "pixels" if args.protocol is None else "inception"
    return list(dict.fromkeys(args.features or [default]))


def _check_arguments(args: argparse.Namespace, names: list[str]) -> None:
    if args.num < 2:
        raise UserError(f"--num {args.num}; expected at least 2 samples")
    if args.precision_recall < 0:
        raise UserError(f"--precision-recall {args.precision_recall}; expected 0 or more images")
    if args.kid is not None and args.kid < 0:
        raise UserError(f"--kid {args.kid}; expected 0 or more subsets")
    for name, suffix in (("out", ".json"), ("samples", ".npz"), ("save_reference", ".npz")):
        path = getattr(args, name)
        if path is not None and path.suffix != suffix:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {path}: expected a name that ends in {suffix}")
    if args.save_reference is not None and len(names) > 1:
        raise UserError(f"--save-reference takes one of the features {', '.join(names)}")


def _check_without_images(args: argparse.Namespace) -> None:
    """Refuses what needs real images, and says what is left out."""
    if args.save_reference is not None:
        raise UserError(f"--save-reference: {args.reference} is of statistics, expected images")
    if args.kid:
        raise UserError(
            f"--kid {args.kid}: {args.reference} is of statistics; expected images, as the kernel "
            "distance compares features one by one"
        )
    if jax.process_index() == 0:
        print(
            f"evaluate: {args.reference} is of statistics: no kernel distance (KID), precision and "
            "recall, which need images",
            file=sys.stderr,
        )


def _check_outputs(args: argparse.Namespace, folder: Path) -> None:
    """Raises a UserError where an output would take the place of something else."""
    taken = {os.path.realpath(os.path.expanduser(args.reference)): "--reference"}
    if args.coco is not None:
        taken[os.path.realpath(args.coco)] = "--coco"
    for name in ("out", "samples", "save_reference"):
        path = getattr(args, name)
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        other = taken.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise UserError(f"{flag} {path} is that of {other}; expected another name")
        # Results may be replaced; and a run that was stopped has perhaps written the others.
        if name != "out" and not folder.exists():
            check_free(path)


def _write(args: argparse.Namespace, results: dict, rows: Rows, kept: tuple[str, ...]) -> None:
    try:
        if args.samples:
            rows.write_npz(args.samples, ("images", *kept))
        write_json(args.out, results)
    except OSError as error:
        raise UserError(f"results cannot be written: {error}") from error


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"dmd-jax: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
