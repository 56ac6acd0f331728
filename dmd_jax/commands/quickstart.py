"""`dmd-jax quickstart`: the digits from end to end, and a report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from dmd_jax.commands.cli import run_step
from dmd_jax.config import load_config, shipped_config
from dmd_jax.data.images import open_images
from dmd_jax.data.pair_shards import PairSource
from dmd_jax.errors import Stopped, UserError
from dmd_jax.evaluation.digits_classifier import class_agreement
from dmd_jax.evaluation.features import feature_extractor
from dmd_jax.evaluation.frechet import Statistics, frechet_distance, gather
from dmd_jax.method.precision import products
from dmd_jax.progress import duration
from dmd_jax.reporting.metrics import read_metrics
from dmd_jax.reporting.pictures import grid, save_png, to_uint8, viewing_scale
from dmd_jax.reporting.provenance import command_line, machine
from dmd_jax.reporting.report import write_report
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.storage.files import local_path, path_of, write_json
from dmd_jax.teachers.families import load_pipeline

NUM_SAMPLES = 10_000
SAMPLES_SEED = 0  # of the latents that the generator is judged by, evaluate's default
TIMED_IMAGES = 2048
PER_CLASS = 8
GAP = 12  # pixels between the sheets of samples.png
CURVES = (
    "loss_regression",
    "loss_matching",
    "loss_fake_score",
    "dm_gradient_norm",
    "mean_abs_real_minus_x",
    "grad_norm_generator",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        type=local_path,
        default=Path("runs/quickstart"),
        metavar="DIR",
        help="what is finished there is not done again (default: runs/quickstart)",
    )
    parser.add_argument(
        "--train-teacher",
        action="store_true",
        help="train the teacher as well, instead of taking the one that ships with dmd_jax",
    )


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    config_path = str(shipped_config("digits"))
    config = load_config(config_path, [])
    workdir = args.workdir
    teacher = path_of(config.teacher.weights)
    try:
        if args.train_teacher:
            teacher = workdir / "teacher"
            run_step("teacher", "--config", config_path, "--workdir", teacher)
        weights = f"--config.teacher.weights={teacher}"
        run_step("pairs", "--config", config_path, weights, "--workdir", workdir / "pairs")
        folder = f"--config.data.pairs={workdir / 'pairs'}"
        run_step("train", "--config", config_path, weights, folder, "--workdir", workdir / "train")
    except Stopped as stopped:
        # It is the quickstart that goes on, not the part that was stopped.
        raise Stopped(stopped.step, stopped.signal_number, workdir) from stopped
    print("quickstart: evaluating", file=sys.stderr)
    results, pictures = _evaluate(teacher, workdir, config)
    results |= {
        "compute_dtype": config.compute_dtype,
        "matmul_precision": config.matmul_precision,
        "command": command_line(),
        "machine": machine(),
    }
    try:
        _write(workdir, results, pictures)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from error
    print(_summary(results))
    print(f"quickstart: {workdir / 'report.html'} ({duration(time.monotonic() - started)})")


def _evaluate(teacher: Path, workdir: Path, config) -> tuple[dict, dict[str, np.ndarray]]:
    """results.json's figures, and images [classes * PER_CLASS, H, W, C] from the same latents."""
    features = feature_extractor("pixels").extract
    reals = open_images(config.data.images)
    real = gather([features(np.stack([reals[index]["x0"] for index in range(len(reals))]))])

    def distance(images: np.ndarray) -> float:
        return frechet_distance(Statistics.of(features(images)), real)

    taught_by = load_pipeline(teacher)
    heun = ImageMaker(taught_by, sampler="heun", num_steps=config.pairs.num_steps)
    one_step = ImageMaker(taught_by, sampler="one-step")
    distilled = ImageMaker(load_pipeline(workdir / "train" / "weights"), sampler="one-step")
    shape, classes = heun.sample_shape, heun.num_classes

    # The pairs are the teacher's samples by the 18-step sampler, so they serve for its figures.
    pairs = PairSource(workdir / "pairs", sample_shape=shape, num_classes=classes)
    records = [pairs[index] for index in range(NUM_SAMPLES)]
    taught = np.stack([record["y_ref"] for record in records])
    taught_labels = np.stack([record["label"] for record in records])
    z = draw_latents(SAMPLES_SEED, 0, NUM_SAMPLES, shape)
    labels = draw_labels(SAMPLES_SEED, 0, NUM_SAMPLES, classes)
    generated = distilled(z, {"label": labels})
    results = {
        "fd": {
            "teacher_heun18": distance(taught),
            "teacher_one_step": distance(one_step(z, {"label": labels})),
            "generator": distance(generated),
        },
        "class_agreement": {
            "teacher_heun18": class_agreement(taught, taught_labels),
            "generator": class_agreement(generated, labels),
        },
        "seconds_per_image": {
            "teacher_heun18": _seconds_per_image(heun, z, labels),
            "generator": _seconds_per_image(distilled, z, labels),
        },
        "num_samples": NUM_SAMPLES,
    }
    shown = {"label": np.repeat(np.arange(classes, dtype=np.int32), PER_CLASS)}
    latents = z[: classes * PER_CLASS]
    pictures = {
        "Teacher, 18 steps": heun(latents, shown),
        "Teacher, one step": one_step(latents, shown),
        "Generator, one step": distilled(latents, shown),
    }
    return results, pictures


def _seconds_per_image(maker: ImageMaker, z: np.ndarray, labels: np.ndarray) -> float:
    maker(z[:1], {"label": labels[:1]})  # compilation is not an image's time
    started = time.perf_counter()
    maker(z[:TIMED_IMAGES], {"label": labels[:TIMED_IMAGES]})
    return (time.perf_counter() - started) / TIMED_IMAGES


def _write(workdir: Path, results: dict, pictures: dict[str, np.ndarray]) -> None:
    sheets = {
        name: grid(to_uint8(images), columns=PER_CLASS, scale=viewing_scale(images.shape[1]))
        for name, images in pictures.items()
    }
    save_png(workdir / "samples.png", _side_by_side(list(sheets.values())))
    write_json(workdir / "results.json", results)
    lines = read_metrics(workdir / "train")
    curves = {
        name: ([line["step"] for line in lines], [line[name] for line in lines]) for name in CURVES
    }
    write_report(
        workdir,
        results,
        sheets,
        curves,
        command=results["command"],
        machine=f"{results['machine']}, in {products(results)}",
    )


def _side_by_side(sheets: list[np.ndarray]) -> np.ndarray:
    gap = np.full((sheets[0].shape[0], GAP, sheets[0].shape[2]), 255, np.uint8)
    parts = [part for sheet in sheets for part in (gap, sheet)]
    return np.concatenate(parts[1:], axis=1)


def _summary(results: dict) -> str:
    fd, agreement, seconds = (
        results[key] for key in ("fd", "class_agreement", "seconds_per_image")
    )
    return "\n".join(
        [
            f"teacher, 18 steps    distance {fd['teacher_heun18']:.3f}  right class "
            f"{agreement['teacher_heun18']:.1%}  {1e3 * seconds['teacher_heun18']:.3f} ms/image",
            f"teacher, one step    distance {fd['teacher_one_step']:.3f}",
            f"generator, one step  distance {fd['generator']:.3f}  right class "
            f"{agreement['generator']:.1%}  {1e3 * seconds['generator']:.3f} ms/image",
        ]
    )
