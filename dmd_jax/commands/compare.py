"""`dmd-jax compare`: trains objectives from one teacher with one budget, and compares them."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from dmd_jax.commands.study import BASELINES, Variant
from dmd_jax.commands.study_command import Plan, add_study_arguments, run_study
from dmd_jax.config import load_config, resolve_config
from dmd_jax.errors import UserError
from dmd_jax.objectives.kinds import KINDS
from dmd_jax.performance.flops import mean_flops
from dmd_jax.teachers.families import family_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="FILE:OBJECTIVE is the config of each; --config.KEY=VALUE overrides a value for all",
    )
    parser.add_argument(
        "--objectives",
        required=True,
        metavar="A,B",
        help=f"some of {', '.join(KINDS)}; a variant of one is NAME=OBJECTIVE+KEY=VALUE, as "
        "four=dmd2+objective.num_steps=4",
    )
    parser.add_argument(
        "--own-steps",
        action="store_true",
        help="each makes the steps of its config, rather than as many as have the operations of "
        "the first one's",
    )
    add_study_arguments(parser)


def run(args: argparse.Namespace) -> None:
    chosen = chosen_objectives(args.objectives)
    given = {name: _arguments(args, *of) for name, of in chosen.items()}
    configs = {name: _config(arguments) for name, arguments in given.items()}
    first = next(iter(given))
    config = resolve_config(given[first][1], given[first][2:], args.workdir, command="compare")
    if not args.own_steps:
        steps = equal_steps(configs)
        for name, count in steps.items():
            given[name].append(f"--config.steps={count}")
            configs[name].steps = count

    def variants(features: Collection[str]) -> dict[str, Variant]:
        return {
            name: Variant(_summary(name, chosen[name]), configs[name], given[name])
            for name in chosen
        }

    title = f"Objectives on {Path(args.config).name}"
    plan = Plan("compare", title, "comparison", config, given[first], variants, detailed=True)
    run_study(args, plan)


def chosen_objectives(text: str) -> dict[str, tuple[str, list[str]]]:
    """{name: (objective, its own overrides)} of "dmd,four=dmd2+objective.num_steps=4".

    Raises:
      UserError: an objective that is not known, a name twice, or one that is no folder's.
    """
    chosen: dict[str, tuple[str, list[str]]] = {}
    for part in text.split(","):
        objective, *overrides = part.strip().split("+")
        name, equals, after = objective.partition("=")
        objective = after if equals else name
        if objective not in KINDS:
            raise UserError(
                f"--objectives: {objective!r} is unknown; expected some of {', '.join(KINDS)}"
            )
        if name in (*BASELINES, "pairs"):
            raise UserError(f"--objectives: {name} is the study's own name; expected another one")
        if name in chosen or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                f"--objectives: the name {name!r} is given twice or is no plain word; expected "
                "another one"
            )
        chosen[name] = objective, [f"--config.{override}" for override in overrides]
    return chosen


def equal_steps(configs: Mapping[str, ConfigDict]) -> dict[str, int]:
    """How many steps of each have as many operations as the first one's own.

    Of the networks' matmuls and convolutions, forward and backward; a player that updates on each
    n-th step counts on each n-th one. Making the pairs is not in it.
    """
    operations = {name: mean_flops(config) for name, config in configs.items()}
    first = next(iter(configs))
    budget = operations[first] * configs[first].steps
    return {name: max(1, round(budget / each)) for name, each in operations.items()}


def _summary(name: str, of: tuple[str, list[str]]) -> str:
    objective, overrides = of
    changes = [override.removeprefix("--config.") for override in overrides]
    return " ".join([objective, *changes])


def _arguments(args: argparse.Namespace, objective: str, overrides: list[str]) -> list[str]:
    """Of `dmd-jax train`."""
    if ":" in Path(args.config).name:
        raise UserError(
            f"--config {args.config}: expected a file alone, whose argument is the objective"
        )
    return ["--config", f"{args.config}:{objective}", *args.overrides, *overrides]


def _config(arguments: list[str]) -> ConfigDict:
    """The config of these arguments of `train`.

    Raises:
      UserError: the file takes no argument or has none of that name, or it is of text.
    """
    _, path, *overrides = arguments
    try:
        config = load_config(path, overrides)
    except UserError as error:
        if "positional argument" not in str(error):
            raise
        file, _, objective = path.rpartition(":")
        raise UserError(
            f"--config {file}: get_config() takes no argument; expected one that takes an "
            f"objective's name, here {objective}, as that of configs/digits.py"
        ) from error
    if family_of(config.network).takes == "text":
        raise UserError(f"--config {path}: the teacher is of text; expected one of images")
    return config
