"""`dmd-jax ablate`: trains the rows of the paper's Table 2 at any scale and compares them."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from dmd_jax.commands.study import Variant
from dmd_jax.commands.study_command import Plan, add_study_arguments, run_study
from dmd_jax.config import resolve_config
from dmd_jax.distillation.ablations import (
    ROWS,
    apply_row,
    chosen_rows,
    paper_fid,
    row_overrides,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        required=True,
        help="of the full objective; --config.KEY=VALUE overrides a value for every row",
    )
    parser.add_argument(
        "--rows", metavar="A,B", help=f"which of {', '.join(ROWS)} (default: all that apply)"
    )
    add_study_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = resolve_config(args.config, args.overrides, args.workdir, command="ablate")
    rows, arguments = chosen_rows(args.rows, config), ["--config", args.config, *args.overrides]

    def variants(features: Collection[str]) -> dict[str, Variant]:
        return {row: row_variant(config, row, arguments, features) for row in rows}

    title = f"Ablation of {Path(args.config).name}"
    run_study(args, Plan("ablate", title, "ablation", config, arguments, variants))


def row_variant(
    config: ConfigDict, row: str, arguments: list[str], features: Collection[str]
) -> Variant:
    """A row of the table: the config with its changes.

    Args:
      arguments: of `dmd-jax train`, which give the config. features: that are measured.
    """
    changed = apply_row(config, row)
    overrides = row_overrides(config, row)
    facts = _paper(config, row, features)
    return Variant(ROWS[row].summary, changed, [*arguments, *overrides], facts)


def _paper(config: ConfigDict, row: str, features: Collection[str]) -> dict[str, float]:
    """The paper's figure where the config is the paper's, and Inception measures."""
    fid = paper_fid(config, row) if "inception" in features else None
    return {} if fid is None else {"paper_fid": fid}
