"""The training loop that every trainer shares: steps, logging, checkpoints, and clean stops."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.config import check_same_run, default_config, lasting, save_config, when_asked
from dmd_jax.config.moved import with_places
from dmd_jax.errors import Stopped, UserError
from dmd_jax.parallel.flags import rounding_flags
from dmd_jax.parallel.sharding import to_mesh
from dmd_jax.parallel.stopping import stop_requests
from dmd_jax.progress import Progress
from dmd_jax.reporting.metrics import MetricsWriter, must_be_finite
from dmd_jax.reporting.profiling import Profile
from dmd_jax.storage.checkpoints import Checkpoints
from dmd_jax.training.state import WITHOUT_PLAYERS, TrainState
from dmd_jax.training.train_step import Metrics


class Stage(NamedTuple):
    """A part of a run with a step and batches of its own."""

    until: int  # steps done at its end
    # The jitted step: (state, batch) -> (state, metrics)
    advance: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    # This process's rows, an iterator with get_state() and set_state(); made when it is needed.
    batches: Callable[[], Iterator[Any]]
    batch: Any  # the whole of one: ShapeDtypeStructs with shardings (`on_rows`)
    images_per_step: int


class Training(NamedTuple):
    """What is trained, on what, and where it is written."""

    name: str  # of the command
    workdir: Path
    config: ConfigDict  # its cadences are used, and it is saved in the workdir
    identity: dict[str, Any]  # JSON-able facts of teacher and data, which a resumed run must share
    abstract: Any  # the state as ShapeDtypeStructs with shardings
    initialize: Callable[[], Any]  # the state before the first step
    # At least one, in the order of their ends. The position in a stage's batches is in checkpoints.
    stages: Sequence[Stage]
    # By the player's name: whether the step after so many updates it, and so has its metrics.
    updates: Mapping[str, Callable[[int], bool]]
    draw_pictures: Callable[[Any], dict[str, np.ndarray]]  # state -> {name: uint8 [H, W, C]}
    profile: range = range(0)  # steps, counted from 1, that are traced into WORKDIR/profile


def run(training: Training) -> Any:
    """Trains to the last stage's end from the newest checkpoint, or from `initialize()`.

    Returns:
      The final state, which is in a checkpoint as well.

    Raises:
      Stopped: on SIGTERM or SIGINT to any process, after a checkpoint, at one step in all.
      UserError: a loss is not finite (names the step), the run there is of another identity or
        past the last stage, or something cannot be written or read.
    """
    loop = _Loop(training)
    try:
        with stop_requests(loop.step) as requested:
            while loop.step < loop.total_steps:
                loop.advance()
                loop.keep()
                if signal_number := requested(loop.step):
                    loop.save()
                    loop.checkpoints.wait()
                    raise Stopped(loop.step, signal_number, training.workdir)
    finally:
        loop.writer.close()
        loop.trace.close()
        if sys.exc_info()[0] is None:
            loop.checkpoints.close()
        elif jax.process_count() == 1:  # of several, the others may never come to their part
            with contextlib.suppress(UserError):  # the error that ends the run is the one to tell
                loop.checkpoints.close()
    return loop.state


class _Loop:
    """A training between two of its steps."""

    def __init__(self, training: Training):
        config, workdir, first = training.config, training.workdir, jax.process_index() == 0
        self._training, self._first = training, first
        self.total_steps = training.stages[-1].until
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
        restored, self._flags = (
            self.checkpoints.restore(training.abstract, WITHOUT_PLAYERS),
            rounding_flags(),
        )
        if restored is None:
            self.step, self.state, position = 0, training.initialize(), {}
        else:
            self.step, self.state, position = restored
            self._check_resumed(position)
        if first:
            # Not before the checkpoint agrees: a refused config must not replace the run's own.
            save_config(config, workdir, command=training.name)
        digest = position.get("metrics")
        self.writer = MetricsWriter(workdir, step=self.step, digest=digest, enabled=first)
        self.trace = Profile(workdir / "profile", training.profile, self.step)
        # The metrics of steps since the last line, which are part of the next one.
        self._pending: list[tuple[int, dict[str, jax.Array | float]]] = [
            (step, metrics) for step, metrics in position.get("pending", [])
        ]
        self._enter_stage()
        if position.get("batches") is not None and position.get("stage", 0) == self._number:
            state = _by_source(position["batches"], self._batches.get_state())
            self._batches.set_state(state)

    def _check_resumed(self, position: dict[str, Any]) -> None:
        """Raises a UserError where the checkpoint is no beginning of this training."""
        name, workdir = self._training.name, self._training.workdir
        config = self._training.config
        _check_same_run(position, self._training.identity, config, workdir)
        if self.step > self.total_steps:
            raise UserError(
                f"{workdir} is at step {self.step:,}, not {self.total_steps:,}; expected steps of "
                "at least that, or another --workdir"
            )
        if self._first:
            print(f"{name}: going on from step {self.step} in {workdir}", file=sys.stderr)
            _tell_other_rates(name, self.step, position.get("config", {}), config)
            _tell_other_flags(name, self.step, position.get("flags", {}), self._flags)

    def _enter_stage(self) -> None:
        """Takes up the stage that the next step belongs to, from the start of its batches."""
        stages = self._training.stages
        self._number = _stage_at(self.step, stages)
        self._stage = stages[self._number]
        self._batches = self._stage.batches()
        self._progress = Progress(
            self._training.name,
            self.total_steps,
            start=self.step,
            per_step=self._stage.images_per_step,
            enabled=self._first,
        )
        self._started_at = self.step

    def advance(self) -> None:
        """One step."""
        if self.step == self._stage.until:
            self._enter_stage()
        with self.trace.step(self._training.name, self.step + 1) as traced:
            batch = to_mesh(next(self._batches), self._stage.batch)
            with jax.transfer_guard("disallow"):
                self.state, metrics = self._stage.advance(self.state, batch)
            traced.append(metrics)
        metrics = _updated(metrics, self._training.updates, self.step)
        self.step += 1
        self._pending.append((self.step, metrics))
        if self.step == self._started_at + 1:
            jax.block_until_ready(metrics)
            self._progress.restart(self.step)

    def keep(self) -> None:
        """Writes what is due after the step: metrics, a checkpoint, pictures."""
        config = self._training.config
        if self._due(config.log_every):
            values = self._check_finite()
            self._pending.clear()
            self._progress.update(self.step, _note(values))
            rate = {"images_per_second": self._progress.rate}
            self.writer.scalars(self.step, values | rate)
        if self._due(config.checkpoint_every):
            # Before the pictures, which may not fit on the disk or in memory.
            self.save()
        if self.step == self.total_steps:
            self.checkpoints.wait()
        if self._due(config.picture_every):
            self._check_finite()
            for picture, image in self._training.draw_pictures(self.state).items():
                self.writer.picture(self.step, picture, image)

    def _due(self, cadence: int) -> bool:
        return self.step % cadence == 0 or self.step == self.total_steps

    def save(self) -> None:
        """Starts writing a checkpoint of the step."""
        self._check_finite()
        self.writer.flush()
        position = {
            "stage": self._number,
            "batches": self._batches.get_state(),
            "identity": self._training.identity,
            "config": lasting(self._training.config),
            "flags": self._flags,
            "pending": self._pending,
            "metrics": self.writer.digest,
        }
        self.checkpoints.save(self.step, self.state, position)

    def _check_finite(self) -> dict[str, float]:
        """Fetches the pending metrics, in place; returns their means.

        Raises:
          UserError: the first loss that is not finite.
        """
        self._pending[:] = [
            (step, {name: float(value) for name, value in jax.device_get(metrics).items()})
            for step, metrics in self._pending
        ]
        values: dict[str, list[float]] = {}
        for step, metrics in self._pending:
            for name, value in metrics.items():
                if must_be_finite(name) and not np.isfinite(value):
                    self.checkpoints.wait()
                    kept = self.checkpoints.steps
                    last = (
                        f"the last good checkpoint is step {kept[-1]}" if kept else "none was saved"
                    )
                    raise UserError(
                        f"{name} is {value} at step {step}; expected a finite number; {last} "
                        f"in {self.checkpoints.folder}"
                    )
                values.setdefault(name, []).append(value)
        return {name: float(np.mean(each)) for name, each in values.items()}


def _updated(
    metrics: Metrics, updates: Mapping[str, Callable[[int], bool]], step: int
) -> dict[str, jax.Array]:
    """The metrics of the players that the step after `step` updates."""
    return {
        name: value
        for player, values in metrics.items()
        if updates[player](step)
        for name, value in values.items()
    }


def _by_source(saved: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """A position in the data by its sources' names, which old checkpoints lack."""
    if "fresh" in saved:
        return {"pairs": saved[""], "prompts": saved["fresh"]}
    return saved if saved.keys() == like.keys() else {next(iter(like)): saved}


def _stage_at(step: int, stages: Sequence[Stage]) -> int:
    """The number of the stage that the step after `step` belongs to; at the end, the last."""
    return next((i for i, stage in enumerate(stages) if step < stage.until), len(stages) - 1)


def _tell_other_rates(name: str, step: int, before: dict[str, Any], config: ConfigDict) -> None:
    """Says on stderr what has changed because it was asked for."""
    before, now = with_places(before), lasting(config)
    for key in sorted(when_asked(now, config.objective.name)):
        if key in before and before[key] != now[key]:
            line = f"config.{key} is {now[key]}, {before[key]} up to step {step}"
            print(f"{name}: {line}", file=sys.stderr)


def _tell_other_flags(name: str, step: int, before: dict[str, str], now: dict[str, str]) -> None:
    """Says on stderr which flags differ from the checkpoint's; earlier versions' have none."""
    differing = [
        f"{flag} is {now[flag]!r}, {value!r} at step {step}"
        for flag, value in before.items()
        if flag in now and now[flag] != value
    ]
    if differing:
        print(
            f"{name}: {'; '.join(differing)}: numbers may round otherwise than those of a run that "
            "was never stopped",
            file=sys.stderr,
        )


def _check_same_run(position, identity: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises a UserError where a checkpoint is of another teacher, of other data or settings."""
    if position["identity"] != identity:
        raise UserError(
            f"{workdir} is a run with {position['identity']}, not with {identity}; expected the "
            "same teacher and data, or another --workdir"
        )
    if "config" in position:  # not in those of earlier versions
        defaults, now = lasting(default_config(config.objective.name)), lasting(config)
        asked = when_asked(now, config.objective.name)
        check_same_run(defaults | with_places(position["config"]), now, workdir, asked=asked)


def _note(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "loss" in name)
