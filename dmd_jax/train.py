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
from dmd_jax.distillation.program import program_of
from dmd_jax.distillation.setting import Setting
from dmd_jax.errors import UserError
from dmd_jax.experiment import (
    loss_options,
    mesh_of,
    shardings_of,
    teacher_of,
)
from dmd_jax.preview import preview
from dmd_jax.sharding import (
    batch_sharding,
    check_batch_size,
    infer_shardings,
    place,
    replicated,
)
from dmd_jax.train_step import EVERY_STEP
from dmd_jax.weights import Weights, save_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "train")
    mesh = mesh_of(config)
    parts = stages_of(config)
    for number, (_, part) in enumerate(parts):
        where = f"config.stages[{number}]" if number < len(config.stages) else "config"
        _check_batches(part, mesh, where)
    teacher = teacher_of(config)
    setting = setting_of(config, teacher)
    method = setting.method
    for _, part in parts:
        loss_options(part, method.schedule)
    program = program_of(config, method, optimizers_of(config), mesh, setting.arguments)
    teacher_params = place(setting.arguments.teacher, shardings_of(program.teacher))
    perceptual_params = place(setting.arguments.perceptual, shardings_of(program.perceptual))
    encode_ahead = _ahead(setting, mesh)

    def stage(number: int) -> loop.Stage:
        until, part = parts[number]
        ends = [0, *(end for end, _ in parts)]
        earlier = [(end - ends[i], one) for i, (end, one) in enumerate(parts[:number])]
        step = program.step(part)
        return loop.Stage(
            until=until,
            advance=lambda train_state, batch: step(
                train_state, teacher_params, perceptual_params, encode_ahead(batch)
            ),
            batches=functools.partial(setting.data, part, earlier),
            images_per_step=part.batch_size,
        )

    final = loop.run(
        name="train",
        workdir=args.workdir,
        config=config,
        identity=setting.identity,
        abstract=program.state,
        initialize=lambda: jax.jit(program.initialize, out_shardings=shardings_of(program.state))(
            teacher_params
        ),
        stages=[stage(number) for number in range(len(parts))],
        mesh=mesh,
        sparse_every=config.generator_every,
        dense=EVERY_STEP,
        draw_pictures=preview(config, setting, teacher_params, perceptual_params, mesh),
    )
    trained = final.generator.params if final.ema is None else final.ema
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(trained)
    if jax.process_index() == 0:
        description = f"one-step generator, distilled for {int(final.step)} steps"
        weights = Weights(teacher.network, jax.device_get(params), description)
        save_weights(args.workdir / "weights", weights)


def _check_batches(config: ConfigDict, mesh: Mesh, where: str) -> None:
    for name in ("batch_size", "regression_batch_size"):
        check_batch_size(
            config[name], mesh, accumulation=config.accumulation, name=f"{where}.{name}"
        )
    if config.match_reference and config.batch_size <= config.regression_batch_size:
        raise UserError(
            f"{where}.batch_size is {config.batch_size}; expected more than "
            f"regression_batch_size={config.regression_batch_size}, whose latents are among it "
            "with config.match_reference"
        )


def _ahead(setting: Setting, mesh: Mesh):
    """batch -> batch with the text encoded, where that is a program of its own."""
    if setting.method.ahead is None:
        return lambda batch: batch
    params = setting.arguments.ahead
    shardings = infer_shardings(params, mesh)
    jitted = jax.jit(
        setting.method.ahead,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh),
    )
    return functools.partial(jitted, place(params, shardings))
