"""The step of a run as one program on a mesh, and what it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import stages_of
from dmd_jax.distillation import method_of
from dmd_jax.distillation.from_config import abstract_state, shardings_of
from dmd_jax.distillation.setting import Method
from dmd_jax.method.types import Params
from dmd_jax.parallel.sharding import (
    infer_shardings,
    on_rows,
    replicated,
    with_shardings,
)
from dmd_jax.teachers.teacher import Frozen
from dmd_jax.training.train_step import Step, initial_state, jit_step, make_train_step

# Frozen parts that every device holds whole: they are small beside what they are asked for.
WHOLE = ("decoders", "lpips")


class Program(NamedTuple):
    """All that a run's steps have in common: shapes with shardings, before any array is made."""

    # (the frozen parameters, those of players that start from others) -> the state at the start
    initialize: Callable[[Any, Any], Any]
    state: Any
    frozen: Any
    step: Callable[[ConfigDict], Step]  # a stage's config -> its jitted step
    batch: Callable[[ConfigDict], Any]  # and the batch that it takes
    kept: str  # the player whose weights the run leaves

    def arguments(self, stage: ConfigDict) -> tuple[Any, ...]:
        """All that the stage's step takes."""
        return self.state, self.frozen, self.batch(stage)


def program_of(
    config: ConfigDict,
    method: Method,
    mesh: Mesh,
    frozen: Frozen,
    starts: Mapping[str, Params] = {},
) -> Program:
    """The program that `train` runs, which the other commands compile and time.

    Args:
      frozen: all frozen parameters, host arrays or ShapeDtypeStructs; only their shapes are used.
      starts: likewise, of `initial_state`.

    Returns:
      A Program whose trees are ShapeDtypeStructs with shardings.
    """
    frozen, before = method.split(frozen)
    shardings = {
        name: jax.tree.map(lambda _: replicated(mesh), part)
        if name in WHOLE
        else infer_shardings(part, mesh)
        for name, part in frozen.items()
    }
    frozen = with_shardings(frozen, shardings)
    objective = method.objective(config)
    initialize = functools.partial(initial_state, objective, seed=config.seed)
    state = abstract_state(initialize, mesh, frozen, starts)

    def step(stage: ConfigDict) -> Step:
        return jit_step(
            make_train_step(method.objective(stage), accumulation=stage.accumulation, mesh=mesh),
            mesh,
            shardings_of(state),
            shardings_of(frozen),
            shardings_of(batch(stage)),
        )

    def batch(stage: ConfigDict) -> Any:
        whole = method.batch(stage)
        if method.ahead is not None:
            whole = jax.eval_shape(method.ahead, before, whole)
        return on_rows(whole, mesh)

    return Program(initialize, state, frozen, step, batch, objective.kept)


def abstract_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The program of a config alone, without weights and data.

    Raises:
      UserError: the config asks for something impossible.
    """
    method = method_of(config)
    for _, stage in stages_of(config):
        method.objective(stage)
    return program_of(config, method, mesh, method.frozen())
