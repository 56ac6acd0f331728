"""The rows of the paper's Table 2 (arXiv 2311.18828), as changes to any config."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dmd_jax.config import flatten, load_config, option_of, shipped_config, value_of
from dmd_jax.errors import UserError

LOWERED_RATE = 1e-5  # of the paper's runs without regression


class Row(NamedTuple):
    """One objective of the study."""

    summary: str
    changes: Callable[[ConfigDict], Mapping[str, Any]]  # config -> {dotted key: value}
    paper: Mapping[str, float]  # the FID that the paper gives, by the name of our config


def lowered(learning_rate: float) -> float:
    """The learning rate of a run without regression.

    A fifth, as on CIFAR-10, where the paper lowers 5e-5 to 1e-5; but not below that 1e-5, nor ever
    raised: ImageNet's 2e-6 stays.
    """
    # The fifth of 5e-5 is 1e-5 but for its last digit, which a config need not show.
    return min(learning_rate, max(LOWERED_RATE, float(f"{learning_rate / 5:.12g}")))


def _without_regression(config: ConfigDict) -> dict[str, float]:
    return {
        f"optimizer.{player}.learning_rate": lowered(optimizer.learning_rate)
        for player, optimizer in config.optimizer.items()
    } | {"objective.regression_weight": 0.0}


ROWS: dict[str, Row] = {
    "full": Row(
        "the config as it is",
        lambda config: {},
        {"cifar10_cond": 2.66, "imagenet64": 2.62},
    ),
    "without_matching": Row(
        "regression only",
        lambda config: {"objective.matching_weight": 0.0},
        {"cifar10_cond": 3.82, "imagenet64": 9.21},
    ),
    "without_regression": Row(
        "matching only, at a lower learning rate",
        _without_regression,
        {"cifar10_cond": 5.58, "imagenet64": 5.61},
    ),
    "sigma_over_alpha": Row(
        "matching weighted by sigma/alpha in place of Eq. 8",
        lambda config: {"objective.weighting": "sigma_over_alpha"},
        {"cifar10_cond": 3.60},
    ),
    "sigma3_over_alpha": Row(
        "matching weighted by sigma^3/alpha in place of Eq. 8",
        lambda config: {"objective.weighting": "sigma3_over_alpha"},
        {"cifar10_cond": 3.71},
    ),
    "l2": Row(
        "squared error in place of LPIPS",
        lambda config: {"objective.distance": "l2"},
        {"cifar10_cond": 2.78},
    ),
}


def chosen_rows(text: str | None, config: ConfigDict) -> list[str]:
    """The names in "a,b", or all; those that change nothing of the config are left out, said so.

    Raises:
      UserError: an unknown name, one given twice, or none that is left.
    """
    names = list(ROWS) if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in ROWS or names.count(name) > 1:
            what = "twice" if name in ROWS else "unknown"
            raise UserError(f"--rows: {name!r} is {what}; expected some of {', '.join(ROWS)}")
    same = [name for name in names if changes_nothing(config, name)]
    if same:
        print(f"ablate: {', '.join(same)} left out: the config is so already", file=sys.stderr)
    if names == same:
        raise UserError(f"--rows {text}: nothing of it changes the config")
    return [name for name in names if name not in same]


def apply_row(config: ConfigDict, name: str) -> ConfigDict:
    """A copy of `config` with the changes of one row.

    Raises:
      UserError: there is no such row, or a stage of the config sets what the row changes.
    """
    changed, changes = ConfigDict(config.to_dict()), _row(name).changes(config)
    for number, stage in enumerate(config.stages):
        if both := sorted(changes.keys() & stage.keys()):
            raise UserError(
                f"config.stages[{number}] sets {', '.join(both)}, which the row {name} changes; "
                "expected a config whose stages leave it"
            )
    changed.update_from_flattened_dict(changes)
    return changed


def row_overrides(config: ConfigDict, name: str) -> list[str]:
    """The same changes as arguments `--config.KEY=VALUE` of a command."""
    return [f"--config.{key}={value}" for key, value in _row(name).changes(config).items()]


def changes_nothing(config: ConfigDict, name: str) -> bool:
    """Whether a row other than "full" is the config as it is, as "l2" where no LPIPS is used."""
    return name != "full" and all(
        value_of(config, key) == value for key, value in _row(name).changes(config).items()
    )


def decisive(config: ConfigDict) -> dict[str, Any]:
    """What decides how a run ends, JSON-able: the config without its paths, cadences and mesh."""
    return {
        key: value
        for key, value in flatten(config.to_dict()).items()
        if key == "steps" or not option_of(key, config.objective.name).may_change
    }


def paper_fid(config: ConfigDict, name: str) -> float | None:
    """The FID that the paper gives for a row of this config; None where it is none of the paper's.

    Paths, cadences and meshes may be other than in the config that ships.
    """
    for stem, fid in _row(name).paper.items():
        if decisive(load_config(str(shipped_config(stem)), [])) == decisive(config):
            return fid
    return None


def _row(name: str) -> Row:
    if name not in ROWS:
        raise UserError(f"ablation {name!r}: unknown; expected one of {', '.join(ROWS)}")
    return ROWS[name]
