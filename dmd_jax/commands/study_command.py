"""What the commands of studies share: their arguments, their course, their results."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dmd_jax.commands import evaluate
from dmd_jax.commands.cli import Parser
from dmd_jax.commands.study import Study, Variant
from dmd_jax.commands.study_report import labelled_rows, summarize, table
from dmd_jax.config import save_config
from dmd_jax.distillation import method_of
from dmd_jax.distillation.from_config import images_of, lpips_of, teacher_of
from dmd_jax.errors import Stopped, UserError
from dmd_jax.reporting.pictures import save_png
from dmd_jax.reporting.provenance import command_line, machine
from dmd_jax.storage.files import local_path, write_json, write_whole
from dmd_jax.storage.weights import denoiser_of, params_sha256
from dmd_jax.storage.workdir_lock import locked

DIGITS_FEATURES = "dmd_jax.evaluation.digits_classifier:features"
# Arguments of `evaluate` that the study gives itself, or whose file the variants would overwrite.
TAKEN = (
    *("--weights", "--out", "--sampler", "--steps", "--num", "--seed"),
    *("--samples", "--save-reference"),
)


class Plan(NamedTuple):
    """What a command makes a study of."""

    command: str
    title: str  # of the table
    stem: str  # of the table's file and the picture's
    config: ConfigDict  # of the teacher, the pairs and the images
    arguments: list[str]  # --config and overrides, which give it
    # The features that are measured -> what is trained, by name.
    variants: Callable[[Collection[str]], Mapping[str, Variant]]
    detailed: bool = False  # whether the table has times, precision and recall


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """All arguments but those that say what is trained."""
    parser.add_argument(
        "--workdir",
        type=local_path,
        required=True,
        metavar="DIR",
        help="what is finished there is not done again",
    )
    parser.add_argument(
        "--seeds",
        default="0,1,2",
        metavar="S,T",
        help="of the training, in place of config.seed; the pairs are shared (default: 0,1,2)",
    )
    parser.add_argument(
        "--num", type=int, default=10_000, metavar="N", help="samples of a row (default: 10000)"
    )
    parser.add_argument(
        "--features",
        action="append",
        default=[],
        metavar="NAME",
        help="as of evaluate; by default pixels, and for the digits their classifier's",
    )
    parser.add_argument(
        "--evaluate",
        default="",
        metavar="ARGUMENTS",
        help='more arguments of evaluate, as --evaluate="--features vgg16 --lpips FILE"',
    )


def run_study(args: argparse.Namespace, plan: Plan) -> None:
    """Trains and evaluates each variant from each seed; writes a table, a picture, results.json.

    Raises:
      UserError: what a variant is refused for, before anything is trained. Stopped: by a signal.
    """
    config, seeds = plan.config, chosen_seeds(args.seeds)
    arguments = evaluate_arguments(args, config)
    teacher = teacher_of(config)
    sample_shape = denoiser_of(teacher).sample_shape
    judges = evaluate.origins(*evaluate.open_judges(_parsed(arguments), sample_shape))
    variants = {
        name: _prepared(variant) for name, variant in plan.variants(judges["features"]).items()
    }
    study = Study(
        name=plan.command,
        config=config,
        arguments=plan.arguments,
        variants=variants,
        evaluate=arguments,
        judges=judges,
        teacher_sha256=params_sha256(teacher.params),
        workdir=args.workdir,
    )
    try:
        with locked(args.workdir):
            # First of all, so that what evaluate refuses is refused before anything is trained.
            baselines = study.baselines()
            save_config(config, args.workdir, command=plan.command)
            pairs = study.make_pairs()
            found = {
                name: {seed: study.run_variant(name, seed, pairs) for seed in seeds}
                for name in variants
            }
    except Stopped as stopped:
        # It is the study that goes on, not the part that was stopped.
        stopped.args = (
            f"stopped at step {stopped.step} of a row; the same command goes on with the study in "
            f"{args.workdir}",
        )
        raise
    results = {
        "baselines": {
            name: {"summary": summary, **summarize({0: baselines[name]})}
            for name, summary in (
                ("teacher", f"Heun, {config.pairs.num_steps} steps"),
                ("teacher_one_step", "the teacher in one step"),
            )
        },
        "rows": {
            name: {"summary": one.summary, **one.facts, **summarize(found[name])}
            for name, one in variants.items()
        },
        "seeds": seeds,
        "compute_dtype": config.compute_dtype,
        "matmul_precision": config.matmul_precision,
        "num_samples": args.num,
        "reference": baselines["teacher"]["reference"],
        "config_file": Path(args.config).name,
        "command": command_line(),
        "machine": machine(),
    }
    text = table(results, title=plan.title, detailed=plan.detailed)
    try:
        save_png(args.workdir / f"{plan.stem}.png", labelled_rows(study.images(seeds[0])))
        write_whole(args.workdir / f"{plan.stem}.md", text.encode())
        write_json(args.workdir / "results.json", results)
    except OSError as error:
        raise UserError(f"--workdir {args.workdir} cannot be written: {error}") from error
    print(text)
    print(f"{plan.command}: {args.workdir / plan.stem}.md and {plan.stem}.png")


def _prepared(variant: Variant) -> Variant:
    """The variant with what it reads.

    Raises:
      UserError: what train would refuse in hours, once the pairs are there.
    """
    config = variant.config
    method = method_of(config)
    needs, images = method.objective(config).needs, None
    if "images" in needs:
        images = [config.data.images, len(images_of(config, method.teacher))]
    if method.judged:
        lpips_of(config)
    return variant._replace(reads_pairs="pairs" in needs, images=images)


def chosen_seeds(text: str) -> list[int]:
    """The numbers in "0,1,2".

    Raises:
      UserError: something else, or a number twice.
    """
    parts = [part.strip() for part in text.split(",")]
    # isdigit alone lets other scripts' digits through; a seed is at most 31 bits.
    if not all(part.isascii() and part.isdigit() and int(part) < 2**31 for part in parts):
        raise UserError(f"--seeds {text!r}; expected whole numbers such as 0,1,2")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} has a number twice; expected each once")
    return seeds


def evaluate_arguments(args: argparse.Namespace, config: ConfigDict) -> list[str]:
    """The arguments of `dmd-jax evaluate` that the user asks for or the config implies.

    Raises:
      UserError: --evaluate cannot be split or names what the study sets itself, there are no real
        images, or too few samples are asked for.
    """
    try:
        given = shlex.split(args.evaluate)
    except ValueError as error:
        raise UserError(f"--evaluate {args.evaluate!r}: {error}") from error
    names = {part.partition("=")[0] for part in given}
    for name in TAKEN:
        if name in names:
            raise UserError(f"--evaluate: {name} is the study's own; expected other arguments")
    if args.num < 2:
        raise UserError(f"--num {args.num}; expected at least 2 samples")
    features = list(args.features)
    if not features and "--features" not in names:
        features = ["pixels"] + ([DIGITS_FEATURES] if config.data.images == "digits" else [])
    for name in features:
        given += ["--features", name]
    if "--reference" not in names:
        if not config.data.images:
            raise UserError(
                "config.data.images is empty; expected real images, or "
                '--evaluate="--reference SOURCE"'
            )
        given += ["--reference", config.data.images]
    return [*given, "--num", str(args.num)]


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The arguments as evaluate sees them, but for those that each row has its own of."""
    parser = Parser(prog="dmd-jax evaluate")
    evaluate.add_arguments(parser)
    return parser.parse_args(["--weights", "", "--out", "", *arguments])
