"""What a config says, as the objects that the commands work with."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import losses
from dmd_jax.errors import UserError
from dmd_jax.schedules import NoiseLevel, NoiseSchedule
from dmd_jax.sharding import infer_shardings, make_mesh
from dmd_jax.weights import Weights, load_weights


def check_ranges(config: ConfigDict) -> None:
    """Raises a UserError that names the first number that no run can use."""
    least = {
        1: (
            "log_every",
            "picture_every",
            "checkpoint_every",
            "keep_checkpoints",
            "generator_every",
            "accumulation",
            "teacher.batch_size",
            "pairs.count",
            "pairs.num_steps",
            "pairs.batch_size",
            "pairs.shard_size",
        ),
        0: ("steps", "warmup_steps", "teacher.steps", "teacher.warmup_steps"),
    }
    for minimum, keys in least.items():
        for key in keys:
            value = config
            for part in key.split("."):
                value = value[part]
            if value < minimum:
                raise UserError(f"config.{key} is {value}; expected at least {minimum}")


def schedule_of(config: ConfigDict) -> NoiseSchedule:
    """The noise schedule by its name: "edm", the one that the networks here are preconditioned for.

    Raises:
      UserError: another name.
    """
    _one_of(config, "schedule", ("edm",))
    return NoiseSchedule.edm()


def fake_weight_of(config: ConfigDict) -> Callable[[NoiseLevel], jax.Array]:
    """EDM's weight of the denoising loss, at the network's sigma_data."""
    sigma_data = config.network.get("sigma_data", 0.5)
    return functools.partial(losses.edm_weight, sigma_data=sigma_data)


def mesh_of(config: ConfigDict) -> Mesh:
    """All devices of all processes in the config's mesh."""
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def teacher_of(config: ConfigDict) -> Weights:
    """The teacher's weights.

    Raises:
      UserError: none are named or readable, or they are of another network than the config's.
    """
    if not config.teacher.weights:
        raise UserError(
            "config.teacher.weights is empty; expected a weights folder or the workdir of "
            "`dmd-jax teacher`"
        )
    weights = load_weights(config.teacher.weights)
    check_same_network(weights.network, config.network.to_dict(), config.teacher.weights)
    return weights


def check_same_network(found: dict[str, Any], expected: dict[str, Any], where: Any) -> None:
    """Raises a UserError that names the options in which two networks differ."""
    found, expected = _jsonable(found), _jsonable(expected)
    names = sorted(found.keys() | expected.keys())
    different = [
        f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
    if different:
        raise UserError(
            f"{where} is of another architecture than config.network: {'; '.join(different)}"
        )


def loss_options(config: ConfigDict, schedule: NoiseSchedule) -> dict[str, Any]:
    """The options of objective.generator_loss.

    Raises:
      UserError: a value of the method that is unknown or out of range.
    """
    _one_of(config, "weighting", losses.WEIGHTINGS)
    _one_of(config, "distance", ("l2",))
    if not 0 <= config.min_index <= config.max_index < schedule.num_levels:
        raise UserError(
            f"config.min_index={config.min_index} and config.max_index={config.max_index}; "
            f"expected 0 <= min_index <= max_index < {schedule.num_levels}"
        )
    return dict(
        matching_weight=config.matching_weight,
        regression_weight=config.regression_weight,
        weighting=config.weighting,
        alpha_factor=config.alpha_factor,
    )


def abstract_state(initialize: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Shapes, then shardings: the state of `initialize(*args)` before any array is made."""
    shapes = jax.eval_shape(initialize, *args)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        infer_shardings(shapes, mesh),
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _one_of(config: ConfigDict, key: str, known: tuple[str, ...]) -> str:
    if config[key] not in known:
        raise UserError(f"config.{key} is {config[key]!r}; expected one of {', '.join(known)}")
    return config[key]


def _jsonable(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, so lists stand for both."""
    return json.loads(json.dumps(options))
