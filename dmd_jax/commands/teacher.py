"""`dmd-jax teacher`: trains an EDM teacher on images."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from dmd_jax.commands.arguments import add_run_arguments, run_config
from dmd_jax.commands.train import train
from dmd_jax.data.sources import ClassNames
from dmd_jax.distillation.from_config import mesh_of
from dmd_jax.distillation.teaching import teaching_of
from dmd_jax.parallel.cpu_connections import introduce
from dmd_jax.parallel.sharding import check_batch_size
from dmd_jax.reporting.profiling import add_profile_argument, profiled_steps
from dmd_jax.storage.weights import CLASSES_FILE

NAMES_SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_profile_argument(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "teacher")
    options = config.teaching
    profile = profiled_steps(args.profile, options.steps)
    mesh = mesh_of(config)
    introduce(mesh)
    check_batch_size(
        options.batch_size,
        mesh,
        accumulation=config.accumulation,
        name="config.teaching.batch_size",
    )
    setting = teaching_of(config)
    _announce(setting.class_names, args.workdir)
    stages = [(options.steps, config)]
    train("teacher", args.workdir, config, setting, stages, mesh=mesh, profile=profile)


def _announce(names: ClassNames, workdir: Path) -> None:
    """Prints which label each class has."""
    if names is None or jax.process_index() > 0:
        return
    shown = [f"{label} {name}" for label, name in enumerate(names) if name is not None]
    if len(shown) > NAMES_SHOWN:
        half = NAMES_SHOWN // 2
        shown[half:-half] = [f"… {len(shown) - 2 * half:,} more in {workdir / CLASSES_FILE} …"]
    print(f"teacher: classes by label: {', '.join(shown)}", flush=True)
