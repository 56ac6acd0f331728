"""The training loop that every trainer shares: steps, logging, checkpoints, and clean stops."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.checkpoints import Checkpoints
from dmd_jax.config import check_same_run, default_config, lasting, save_config
from dmd_jax.errors import Stopped, UserError
from dmd_jax.flags import rounding_flags
from dmd_jax.metrics import MetricsWriter, Progress, must_be_finite
from dmd_jax.parallel.stopping import stop_requests
from dmd_jax.profiling import Profile
from dmd_jax.sharding import to_mesh
from dmd_jax.state import TrainState
from dmd_jax.train_step import Metrics


class Stage(NamedTuple):
    """A part of a run with a step and batches of its own."""

    until: int  # steps done at its end
    # The jitted step: (state, batch) -> (state, metrics)
    advance: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    # This process's rows, an iterator with get_state() and set_state(); made when it is needed.
    batches: Callable[[], Iterator[Any]]
    batch: Any  # the whole of one: ShapeDtypeStructs with shardings (`on_rows`)
    images_per_step: int


def run(
    *,
    name: str,
    workdir: Path,
    config: ConfigDict,
    identity: dict[str, Any],
    abstract: Any,
    initialize: Callable[[], Any],
    stages: Sequence[Stage],
    draw_pictures: Callable[[Any], dict[str, np.ndarray]],
    every: Mapping[str, int],
    profile: range = range(0),
) -> Any:
    """Trains to the last stage's end from the newest checkpoint, or from `initialize()`.

    Args:
      config: its cadences are used here, and it is saved in the workdir.
      identity: JSON-able facts of the teacher and the data, which a resumed run must share.
      abstract: the state as ShapeDtypeStructs with shardings.
      stages: at least one, in the order of their ends. The position in a stage's batches is in
        the checkpoints.
      draw_pictures: state -> {name: uint8 [H, W, C]}.
      every: by the player's name: it has metrics on the first step and on each n-th after it.
      profile: steps, counted from 1, that are traced into WORKDIR/profile.

    Returns:
      The final state, which is in a checkpoint as well.

    Raises:
      Stopped: on SIGTERM or SIGINT to any process, after a checkpoint, at one step in all.
      UserError: a loss is not finite (names the step), the run there is of another identity or
        past the last stage, or something cannot be written or read.
    """
    first = jax.process_index() == 0
    total_steps = stages[-1].until
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    restored, flags = checkpoints.restore(abstract), rounding_flags()
    if restored is None:
        step, state, position = 0, initialize(), {}
    else:
        step, state, position = restored
        _check_same_run(position, identity, config, workdir)
        if step > total_steps:
            raise UserError(
                f"{workdir} is at step {step:,}, not {total_steps:,}; expected steps of at least "
                "that, or another --workdir"
            )
        if first:
            print(f"{name}: going on from step {step} in {workdir}", file=sys.stderr)
            _tell_other_flags(name, step, position.get("flags", {}), flags)
    if first:
        # Not before the checkpoint agrees: a refused config must not replace the run's own.
        save_config(config, workdir, command=name)
    writer = MetricsWriter(workdir, step=step, digest=position.get("metrics"), enabled=first)
    trace = Profile(workdir / "profile", profile, step)
    number = _stage_at(step, stages)
    batches = stages[number].batches()
    if position.get("batches") is not None and position.get("stage", 0) == number:
        batches.set_state(_by_source(position["batches"], batches.get_state()))
    progress = _progress(name, stages, number, step, enabled=first)
    # The metrics of steps since the last line, which are part of the next one.
    pending: list[tuple[int, dict[str, jax.Array | float]]] = [
        (step, metrics) for step, metrics in position.get("pending", [])
    ]

    def save() -> None:
        _check_finite(pending, checkpoints)
        writer.flush()
        position = {
            "stage": number,
            "batches": batches.get_state(),
            "identity": identity,
            "config": lasting(config),
            "flags": flags,
            "pending": pending,
            "metrics": writer.digest,
        }
        checkpoints.save(step, state, position)

    started_at = step
    try:
        with stop_requests(step) as requested:
            while step < total_steps:
                if step == stages[number].until:
                    number = _stage_at(step, stages)
                    batches = stages[number].batches()
                    progress = _progress(name, stages, number, step, enabled=first)
                    started_at = step
                with trace.step(name, step + 1) as traced:
                    batch = to_mesh(next(batches), stages[number].batch)
                    with jax.transfer_guard("disallow"):
                        state, metrics = stages[number].advance(state, batch)
                    traced.append(metrics)
                metrics = _updated(metrics, every, step)
                step += 1
                pending.append((step, metrics))
                if step == started_at + 1:
                    jax.block_until_ready(metrics)
                    progress.restart(step)
                if step % config.log_every == 0 or step == total_steps:
                    values = _check_finite(pending, checkpoints)
                    pending.clear()
                    progress.update(step, _note(values))
                    writer.scalars(step, values | {"images_per_second": progress.rate})
                if step % config.checkpoint_every == 0 or step == total_steps:
                    # Before the pictures, which may not fit on the disk or in memory.
                    save()
                if step == total_steps:
                    checkpoints.wait()
                if step % config.picture_every == 0 or step == total_steps:
                    _check_finite(pending, checkpoints)
                    for picture, image in draw_pictures(state).items():
                        writer.picture(step, picture, image)
                if signal_number := requested(step):
                    save()
                    checkpoints.wait()
                    raise Stopped(step, signal_number, workdir)
    finally:
        writer.close()
        trace.close()
        if sys.exc_info()[0] is None:
            checkpoints.close()
    return state


def _updated(metrics: Metrics, every: Mapping[str, int], step: int) -> dict[str, jax.Array]:
    """The metrics of the players that the step after `step` updates."""
    return {
        name: value
        for player, values in metrics.items()
        if step % every[player] == 0
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


def _progress(name: str, stages, number: int, step: int, *, enabled: bool) -> Progress:
    per_step = stages[number].images_per_step
    return Progress(name, stages[-1].until, start=step, per_step=per_step, enabled=enabled)


def _check_same_run(position, identity: dict[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Raises a UserError where a checkpoint is of another teacher, of other data or settings."""
    if position["identity"] != identity:
        raise UserError(
            f"{workdir} is a run with {position['identity']}, not with {identity}; expected the "
            "same teacher and data, or another --workdir"
        )
    if "config" in position:  # not in those of earlier versions
        defaults = lasting(default_config())
        check_same_run(defaults | position["config"], lasting(config), workdir)


def _check_finite(pending, checkpoints: Checkpoints) -> dict[str, float]:
    """Fetches the metrics, in place; returns their means, or raises at the first bad loss."""
    pending[:] = [
        (step, {name: float(value) for name, value in jax.device_get(metrics).items()})
        for step, metrics in pending
    ]
    values: dict[str, list[float]] = {}
    for step, metrics in pending:
        for name, value in metrics.items():
            if must_be_finite(name) and not np.isfinite(value):
                checkpoints.wait()
                kept = checkpoints.steps
                last = f"the last good checkpoint is step {kept[-1]}" if kept else "none was saved"
                raise UserError(
                    f"{name} is {value} at step {step}; expected a finite number; {last} "
                    f"in {checkpoints.folder}"
                )
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


def _note(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "loss" in name)
