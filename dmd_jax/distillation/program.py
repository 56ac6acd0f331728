"""The step of a distillation as one program on a mesh, and what it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import stages_of
from dmd_jax.distillation import (
    Optimizers,
    initial_state,
    method_of,
    optimizers_of,
    train_step_of,
)
from dmd_jax.distillation.setting import Arguments, Method
from dmd_jax.experiment import abstract_state, loss_options, shardings_of
from dmd_jax.flops import count_flops
from dmd_jax.models.attention import at_once
from dmd_jax.sharding import infer_shardings, make_mesh, on_rows, replicated, with_shardings
from dmd_jax.train_step import Batch, Step, jit_step


class Program(NamedTuple):
    """All that a run's steps have in common: shapes with shardings, before any array is made."""

    initialize: Callable[[Any], Any]  # the teacher's parameters -> the state at the start
    state: Any
    teacher: Any
    perceptual: Any
    step: Callable[[ConfigDict], Step]  # a stage's config -> its jitted step
    batch: Callable[[ConfigDict], Batch]  # and the batch that it takes

    def arguments(self, stage: ConfigDict) -> tuple[Any, ...]:
        """All that the stage's step takes."""
        return self.state, self.teacher, self.perceptual, self.batch(stage)


def program_of(
    config: ConfigDict, method: Method, optimizers: Optimizers, mesh: Mesh, arguments: Arguments
) -> Program:
    """The program that `train` runs, which the other commands compile and time.

    Args:
      arguments: host arrays or ShapeDtypeStructs; only their shapes are used.

    Returns:
      A Program whose trees are ShapeDtypeStructs with shardings.
    """
    teacher = with_shardings(arguments.teacher, infer_shardings(arguments.teacher, mesh))
    perceptual = with_shardings(
        arguments.perceptual, jax.tree.map(lambda _: replicated(mesh), arguments.perceptual)
    )
    initialize = functools.partial(initial_state, config, method, optimizers)
    state = abstract_state(initialize, mesh, teacher)

    def step(stage: ConfigDict) -> Step:
        return jit_step(
            train_step_of(stage, method, optimizers, mesh),
            mesh,
            shardings_of(state),
            shardings_of(teacher),
            shardings_of(perceptual),
            shardings_of(batch(stage)),
        )

    def batch(stage: ConfigDict) -> Batch:
        whole = method.batch(stage)
        if method.ahead is not None:
            whole = jax.eval_shape(method.ahead, arguments.ahead, whole)
        return on_rows(whole, mesh)

    return Program(initialize, state, teacher, perceptual, step, batch)


def abstract_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The program of a config alone, without weights and data.

    Raises:
      UserError: the config asks for something impossible.
    """
    method = method_of(config)
    for _, stage in stages_of(config):
        loss_options(stage, method.schedule)
    return program_of(config, method, optimizers_of(config), mesh, method.arguments())


def model_flops(stage: ConfigDict) -> int:
    """Operations that a stage's step needs, without what is computed again to save memory."""
    stage = ConfigDict(stage.to_dict() | {"remat": "none"})
    program = abstract_program(stage, make_mesh(devices=jax.devices()[:1]))
    with at_once():
        return count_flops(program.step(stage), *program.arguments(stage))
