"""`dmd-jax train`: distils the teacher into a one-step generator."""

from __future__ import annotations

import argparse
import functools

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import loop
from dmd_jax.arguments import add_run_arguments, run_config
from dmd_jax.config import stages_of
from dmd_jax.distillation import optimizers_of, setting_of
from dmd_jax.distillation.program import Program, program_of
from dmd_jax.distillation.setting import Setting
from dmd_jax.experiment import (
    check_batches,
    loss_options,
    mesh_of,
    shardings_of,
    teacher_of,
)
from dmd_jax.introduction import introduce
from dmd_jax.preview import preview
from dmd_jax.profiling import add_profile_argument, profiled_steps
from dmd_jax.sharding import (
    infer_shardings,
    on_rows,
    place,
)
from dmd_jax.train_step import EVERY_STEP
from dmd_jax.weights import Weights, save_class_names, save_from_devices
from dmd_jax.workdir_lock import locked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_profile_argument(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "train")
    profile = profiled_steps(args.profile, config.steps)
    mesh = mesh_of(config)
    introduce(mesh)
    parts = stages_of(config)
    for number, (_, part) in enumerate(parts):
        where = f"config.stages[{number}]" if number < len(config.stages) else "config"
        check_batches(part, mesh, where)
    teacher = teacher_of(config)
    setting = setting_of(config, teacher)
    method = setting.method
    for _, part in parts:
        loss_options(part, method.schedule)
    program = program_of(config, method, optimizers_of(config), mesh, setting.arguments)
    teacher_params = place(setting.arguments.teacher, shardings_of(program.teacher))
    perceptual_params = place(setting.arguments.perceptual, shardings_of(program.perceptual))

    def stage(number: int) -> loop.Stage:
        until, part = parts[number]
        ends = [0, *(end for end, _ in parts)]
        earlier = [(end - ends[i], one) for i, (end, one) in enumerate(parts[:number])]
        step, encode_ahead = program.step(part), _ahead(setting, program, part, mesh)
        return loop.Stage(
            until=until,
            advance=lambda train_state, batch: step(
                train_state, teacher_params, perceptual_params, encode_ahead(batch)
            ),
            batches=functools.partial(setting.data, mesh, part, earlier),
            batch=on_rows(method.batch(part), mesh),
            images_per_step=part.batch_size,
        )

    with locked(args.workdir, first=jax.process_index() == 0):
        if jax.process_index() == 0:
            save_class_names(args.workdir, teacher.class_names)
        final = loop.run(
            name="train",
            workdir=args.workdir,
            config=config,
            identity=setting.identity,
            abstract=program.state,
            initialize=lambda: jax.jit(
                program.initialize, out_shardings=shardings_of(program.state)
            )(teacher_params),
            stages=[stage(number) for number in range(len(parts))],
            sparse_every=config.generator_every,
            dense=EVERY_STEP,
            profile=profile,
            draw_pictures=preview(config, setting, teacher_params, perceptual_params, mesh),
        )
        trained = final.generator.params if final.ema is None else final.ema
        description = f"one-step generator, distilled for {int(final.step)} steps"
        weights = Weights(teacher.network, trained, description, class_names=teacher.class_names)
        save_from_devices(args.workdir / "weights", weights)


def _ahead(setting: Setting, program: Program, stage: ConfigDict, mesh: Mesh):
    """batch -> batch with the text encoded, where that is a program of its own."""
    if setting.method.ahead is None:
        return lambda batch: batch
    params = setting.arguments.ahead
    jitted = jax.jit(setting.method.ahead, out_shardings=shardings_of(program.batch(stage)))
    return functools.partial(jitted, place(params, infer_shardings(params, mesh)))
