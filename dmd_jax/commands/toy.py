"""`dmd-jax toy`: the paper's Figure 3, three objectives on a two-mode mixture in the plane.

The real score is exact, the generator and the fake score are MLPs, and the step and the losses are
those of every distillation. configs/toy2d.py says what is claimed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.commands.toy_problem import Plane, make_plane, measure
from dmd_jax.config import resolve_config, save_config, settings_of
from dmd_jax.errors import UserError
from dmd_jax.parallel.sharding import replicated
from dmd_jax.progress import Progress
from dmd_jax.reporting.metrics import MetricsWriter, must_be_finite
from dmd_jax.reporting.pictures import save_png
from dmd_jax.reporting.provenance import command_line, machine
from dmd_jax.reporting.scatter import Panel, draw_panels
from dmd_jax.storage.files import local_path, write_json
from dmd_jax.storage.workdir_lock import locked
from dmd_jax.training.train_step import initial_state, jit_step, make_train_step

# What each objective changes of the config's settings.
OBJECTIVES = {
    "real_score": {"use_fake_score": False, "regression_weight": 0.0},
    "real_minus_fake": {"regression_weight": 0.0},
    "full": {},
}
TITLES = {
    "initial": "Initial fakes",
    "real_score": "(a) Real score only",
    "real_minus_fake": "(b) Real minus fake score",
    "full": "(c) Real minus fake, and regression",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configs/toy2d.py or one like it; --config.KEY=VALUE overrides a value",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        type=local_path,
        help="where figure3.png is written",
    )


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    results = args.workdir / "results.json"
    if results.exists():
        raise UserError(f"{results} exists; expected a --workdir without a finished run")
    config = resolve_config(args.config, args.overrides, args.workdir, command="toy")
    plane = make_plane(config)
    with locked(args.workdir):
        save_config(config, args.workdir, command="toy")
        fakes = {}
        for objective in OBJECTIVES:
            with _writing(args.workdir):
                (args.workdir / objective).mkdir(exist_ok=True)
                writer = MetricsWriter(args.workdir / objective)
            try:
                fakes["initial"], fakes[objective] = train(config, plane, objective, writer)
            finally:
                writer.close()
    fakes = {name: fakes[name] for name in TITLES}
    panels = {name: measure(points, plane) for name, points in fakes.items()}
    summary = {
        "command": command_line(),
        "machine": machine(),
        "compute_dtype": config.compute_dtype,
        "matmul_precision": config.matmul_precision,
        "seconds": round(time.monotonic() - started, 1),
        "panels": panels,
    }
    # results.json comes last: it says that the run is finished.
    with _writing(args.workdir):
        save_png(args.workdir / "figure3.png", _picture(fakes, panels, plane))
        write_json(results, summary)
    for name, panel in panels.items():
        print(f"{TITLES[name]}: {_describe(panel)}")
    print(args.workdir / "figure3.png")


def train(
    config: ConfigDict, plane: Plane, objective: str, writer: MetricsWriter
) -> tuple[np.ndarray, np.ndarray]:
    """Trains under one of OBJECTIVES; returns the fakes [N, 2] before and after.

    Raises:
      UserError: a loss or a gradient is not finite; names the step.
    """
    settings = dataclasses.replace(
        settings_of(config),
        regression_batch_size=len(plane.pairs["z_ref"]),
        **OBJECTIVES[objective],
    )
    chosen = plane.objective(settings)
    step = make_train_step(chosen, accumulation=config.accumulation, mesh=plane.mesh)

    # The step takes less time than its dispatch from Python, so one call makes many of them.
    def many(train_state, frozen, batch):
        return jax.lax.scan(
            lambda carry, _: step(carry, frozen, batch), train_state, length=config.log_every
        )

    whole = replicated(plane.mesh)
    initialize = functools.partial(initial_state, chosen, seed=config.seed)
    train_state = jax.jit(initialize, out_shardings=whole)(plane.frozen)
    advance = jit_step(many, plane.mesh, whole, whole)
    batch = {"pairs": plane.pairs} if "pairs" in chosen.needs else {}
    generate = jax.jit(lambda params: plane.generate(params, plane.latents, None))
    initial = np.asarray(generate(train_state.players["generator"].params))
    progress = Progress(objective, config.steps, unit="samples", per_step=config.batch_size)
    for done in range(config.log_every, config.steps + 1, config.log_every):
        train_state, metrics = advance(train_state, plane.frozen, batch)
        values = {}
        for player, found in jax.device_get(metrics).items():
            _check_finite(found, objective, done - config.log_every)
            # A player's metrics are zero on the steps that do not update it.
            updated = chosen.players[player].updates(np.arange(done - config.log_every, done))
            values |= {name: float(each[updated].mean()) for name, each in found.items()}
        losses = (f"{name} {value:.4g}" for name, value in values.items() if "loss" in name)
        progress.update(done, "  ".join(losses))
        writer.scalars(done, values)
        if done == config.log_every:
            progress.restart(done)
    return initial, np.asarray(generate(train_state.players["generator"].averaged))


def _describe(panel: dict[str, Any]) -> str:
    parts = []
    for index, mode in enumerate(panel["modes"]):
        spread = f", spread {mode['spread']:.2f}" if mode["share"] else ""
        parts.append(f"mode {index + 1}: {mode['share']:.0%}{spread}")
    return "   ".join(parts)


def _picture(fakes: dict[str, np.ndarray], panels: dict[str, Any], plane: Plane) -> np.ndarray:
    """The four panels; the circles are two standard deviations, which hold 86% of a mode."""
    drawn = [Panel(TITLES[name], _describe(panels[name]), fakes[name]) for name in TITLES]
    return draw_panels(drawn, real=plane.real, centers=plane.means, radius=2 * plane.std)


def _check_finite(metrics: dict[str, np.ndarray], objective: str, done: int) -> None:
    for name, values in metrics.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if must_be_finite(name) and len(bad):
            raise UserError(
                f"{name} of the objective {objective} is {values[bad[0]]} at step "
                f"{done + bad[0] + 1}; expected a finite number"
            )


@contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error}") from error
