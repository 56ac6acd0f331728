"""How many floating-point operations a function, or a step, asks for, from its jaxpr alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from dmd_jax.distillation.program import abstract_program
from dmd_jax.models.ops.attention import at_once
from dmd_jax.parallel.sharding import make_mesh

# The operations of each branch of a condition -> what the condition counts.
Choose = Callable[[Sequence[int]], float]


def count_flops(function: Callable[..., Any], *args: Any, of_branches: Choose = max) -> float:
    """The multiplications and additions of a function's matmuls and convolutions.

    A multiply-add is two operations. Loops count as often as they run, and a convolution's products
    with padding do not count, nor does what no result depends on. What the function computes again
    for memory's sake (jax.checkpoint) counts as well: leave that out of the function to know what
    its model needs. Pallas kernels count as nothing.

    Args:
      args: arrays or ShapeDtypeStructs.
      of_branches: of a condition's, which count; the dearest by default.

    Raises:
      ValueError: a loop whose length is not known beforehand.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr, of_branches)


def mean_flops(config: ConfigDict) -> float:
    """Operations of a step in the mean over steps, of which some leave the generator alone.

    Of a generator of several steps it counts the mean number of those that lead to the one that
    learns. A fake score that rests while the generator learns (`alternate`) counts as if it did
    not.
    """
    every = config.objective.get("generator_every", 1)
    if every == 1:
        return model_flops(config, of_branches=statistics.fmean)
    # Whole steps, and the mean of one that is and one that leaves the generator alone.
    counts = []
    for other in (1, 2):
        changed = ConfigDict(config.to_dict())
        changed.objective.generator_every = other
        if "alternate" in changed.objective:
            changed.objective.alternate = False
        counts.append(model_flops(changed, of_branches=statistics.fmean))
    whole, half = counts
    return (whole + (every - 1) * (2 * half - whole)) / every


def model_flops(stage: ConfigDict, of_branches: Choose = max) -> float:
    """Operations that a stage's step needs, without what is computed again to save memory."""
    stage = ConfigDict(stage.to_dict() | {"remat": "none"})
    program = abstract_program(stage, make_mesh(devices=jax.devices()[:1]))
    with at_once():
        arguments = program.arguments(stage)
        return count_flops(program.step(stage), *arguments, of_branches=of_branches)


def _of_jaxpr(jaxpr: core.Jaxpr, of_branches: Choose) -> float:
    return sum(_of_equation(equation, of_branches) for equation in _alive(jaxpr))


def _alive(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """The equations that a result depends on; the compiler leaves out the others."""
    needed, alive = {id(variable) for variable in jaxpr.outvars}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            alive.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return alive


def _of_equation(equation: core.JaxprEqn, of_branches: Choose) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        return of_branches([_of_jaxpr(one.jaxpr, of_branches) for one in params["branches"]])
    if name == "scan":
        return params["length"] * _of_jaxpr(params["jaxpr"].jaxpr, of_branches)
    if name == "while":
        inner = _of_jaxpr(params["body_jaxpr"].jaxpr, of_branches)
        if inner:
            raise ValueError("a loop of unknown length has matmuls in it; expected a scan")
        return 0
    if name == "pallas_call":
        return 0
    times = math.prod(params["mesh"].shape.values()) if name == "shard_map" else 1
    return times * sum(_of_jaxpr(inner, of_branches) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs that an equation calls once: of jit, of custom derivatives, of checkpoints."""
    called = [params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params]
    return [getattr(one, "jaxpr", one) for one in called]


def _of_convolution(equation: core.JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (variable.aval.shape for variable in equation.invars)
    result = equation.outvars[0].aval.shape
    pairs = 1
    for axis, stride in enumerate(params["window_strides"]):
        pairs *= _products(
            image[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            result[numbers.out_spec[2 + axis]],
            stride=stride,
            before=params["padding"][axis][0],
            image_dilation=params["lhs_dilation"][axis],
            kernel_dilation=params["rhs_dilation"][axis],
        )
    batch, features = (result[axis] for axis in numbers.out_spec[:2])
    inputs = kernel[numbers.rhs_spec[1]]  # of one group
    return 2 * batch * features * inputs * pairs


def _products(
    image: int,
    kernel: int,
    result: int,
    *,
    stride: int,
    before: int,
    image_dilation: int,
    kernel_dilation: int,
) -> int:
    """Along one axis, the (result, kernel) positions that meet a pixel rather than a zero."""
    position = (
        stride * np.arange(result)[:, None] + kernel_dilation * np.arange(kernel)[None] - before
    )
    inside = (position >= 0) & (position <= image_dilation * (image - 1))
    return int(np.sum(inside & (position % image_dilation == 0)))
