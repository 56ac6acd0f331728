"""`dmd-jax train`: distils the teacher into a one-step generator."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.commands.arguments import add_run_arguments, run_config
from dmd_jax.config import named_stages, stages_of
from dmd_jax.distillation import setting_of
from dmd_jax.distillation.from_config import check_batches, mesh_of, shardings_of, teacher_of
from dmd_jax.distillation.program import Program, program_of
from dmd_jax.distillation.setting import Method, Setting, data_of
from dmd_jax.distillation.training_pictures import preview
from dmd_jax.parallel.cpu_connections import introduce
from dmd_jax.parallel.sharding import infer_shardings, on_rows, place
from dmd_jax.reporting.parameters import tell_parameters
from dmd_jax.reporting.profiling import add_profile_argument, profiled_steps
from dmd_jax.storage.block_cache import add_cache_argument, limit_cache
from dmd_jax.storage.weights import Weights, sampling_of, save_class_names, save_from_devices
from dmd_jax.storage.workdir_lock import locked
from dmd_jax.teachers.teacher import Frozen
from dmd_jax.training import loop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_profile_argument(parser)
    add_cache_argument(parser)


def run(args: argparse.Namespace) -> None:
    limit_cache(args.cache_gb)
    config = run_config(args, "train")
    profile = profiled_steps(args.profile, config.steps)
    mesh = mesh_of(config)
    introduce(mesh)
    for where, stage in named_stages(config):
        check_batches(stage, mesh, where)
    setting = setting_of(config, teacher_of(config))
    train("train", args.workdir, config, setting, stages_of(config), mesh=mesh, profile=profile)


def train(
    name: str,
    workdir: Path,
    config: ConfigDict,
    setting: Setting,
    stages: list[tuple[int, ConfigDict]],
    *,
    mesh: Mesh,
    profile: range,
) -> None:
    """Trains a setting's players through its stages; writes the weights of the kept one.

    Args:
      name: of the command. stages: as config.stages_of gives them.
      profile: steps, counted from 1, that are traced into WORKDIR/profile.

    Raises:
      Stopped: on SIGTERM or SIGINT, after a checkpoint.
      UserError: as loop.run.
    """
    method = setting.method
    program = program_of(config, method, mesh, setting.frozen, setting.starts)
    host, host_before = method.split(setting.frozen)
    frozen = place(host, shardings_of(program.frozen))
    before = place(host_before, infer_shardings(host_before, mesh))
    objective = method.objective(config)
    if jax.process_index() == 0:
        tell_parameters(name, objective.kept, program.state.players[objective.kept].params)

    def stage(number: int) -> loop.Stage:
        until, part = stages[number]
        ends = [0, *(end for end, _ in stages)]
        earlier = [(end - ends[i], one) for i, (end, one) in enumerate(stages[:number])]
        step, encode = program.step(part), _encoder(method, program, part, before)
        return loop.Stage(
            until=until,
            advance=lambda state, batch: step(state, frozen, encode(batch)),
            batches=functools.partial(data_of, setting, mesh, part, earlier),
            batch=on_rows(method.batch(part), mesh),
            images_per_step=method.objective(part).batch_size,
        )

    def initialize() -> Any:
        # On no device but for this, since steps do not take them.
        starts = place(setting.starts, infer_shardings(setting.starts, mesh))
        jitted = jax.jit(program.initialize, out_shardings=shardings_of(program.state))
        return jitted(frozen, starts)

    with locked(workdir, first=jax.process_index() == 0):
        if jax.process_index() == 0:
            save_class_names(workdir, setting.class_names)
        training = loop.Training(
            name=name,
            workdir=workdir,
            config=config,
            identity=setting.identity,
            abstract=program.state,
            initialize=initialize,
            stages=[stage(number) for number in range(len(stages))],
            updates={player: one.updates for player, one in objective.players.items()},
            profile=profile,
            draw_pictures=preview(setting, objective, frozen, before, mesh),
        )
        final = loop.run(training)
        trained = final.players[objective.kept].averaged
        description = setting.description.format(step=int(final.step))
        weights = Weights(
            setting.network,
            trained,
            description,
            class_names=setting.class_names,
            generator=sampling_of(config.objective) if objective.kept == "generator" else {},
        )
        save_from_devices(workdir / "weights", weights)


def _encoder(
    method: Method, program: Program, stage: ConfigDict, before: Frozen
) -> Callable[[Any], Any]:
    """batch -> batch with the text encoded, where that is a program of its own."""
    if method.ahead is None:
        return lambda batch: batch
    jitted = jax.jit(method.ahead, out_shardings=shardings_of(program.batch(stage)))
    return functools.partial(jitted, before)
