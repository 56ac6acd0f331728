"""The one step: an objective's players in turn; a pure function, jitted and sharded."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmd_jax.method.randomness import Role, key_data, role_key
from dmd_jax.method.types import Params
from dmd_jax.objectives.objective import Batch, Objective, View
from dmd_jax.parallel.sharding import batch_sharding, program_for, replicated
from dmd_jax.teachers.teacher import Frozen
from dmd_jax.training.state import PlayerState, TrainState, apply_gradients, train_state, update_ema

# Each player's metrics, by its name. Those of a step that does not update it are zeros.
Metrics = dict[str, dict[str, jax.Array]]
Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def initial_state(
    objective: Objective, frozen: Frozen, starts: Mapping[str, Params] = {}, *, seed: int
) -> TrainState:
    """The state before the first step.

    Args:
      starts: what players start from in place of the frozen network's parameters, by name.
    """
    key = role_key(key_data(seed), 0, Role.INIT)
    players = objective.players

    def start(name: str) -> Params:
        given = {"network": starts[name]} if name in starts else {}
        return players[name].init({**frozen, **given}, key)

    params = {name: start(name) for name in players}
    carries = {name: one.carry for name, one in players.items() if one.carry is not None}
    return train_state(
        params,
        {name: player.optimizer.transformation for name, player in players.items()},
        averaged=[name for name, player in players.items() if player.ema_decay > 0],
        carries={name: carry(params[name]) for name, carry in carries.items()},
        seed=seed,
    )


def make_train_step(
    objective: Objective, *, accumulation: int = 1, mesh: Mesh | None = None
) -> Step:
    """Builds `train_step(state, frozen, batch) -> (state, metrics)`.

    The players update in the objective's order. A player's loss sees the others' parameters as they
    are at that time, and what earlier losses of the step shared.

    Args:
      accumulation: micro-batches of each player's update; they change the memory needed, and the
        result only of a loss that takes a mean of its own over a batch, as f-distill's weights.
      mesh: over whose data and fsdp axes each device works on its own rows.
    """

    def updated(name: str, state: PlayerState, updates: jax.Array, view: View):
        """(the player after its update, its metrics, what its loss shares of all micro-batches)."""
        player = objective.players[name]
        view = view._replace(carry=state.carry)

        def gradients(part: tuple[Any, Any]):
            rows, shared = _split_rows(part, mesh)
            (_, seen), grads = jax.value_and_grad(player.loss, has_aux=True)(
                state.params, view._replace(rows=rows, shared=shared)
            )
            return (grads, dict(seen.metrics), seen.carry), dict(seen.shared)

        (grads, metrics, carry), shared = accumulate(
            gradients, (view.rows, view.shared), accumulation
        )
        metrics[f"grad_norm_{name}"] = optax.tree.norm(grads)
        metrics[f"learning_rate_{name}"] = player.optimizer.learning_rate(updates)
        state = apply_gradients(state, grads, player.optimizer.transformation, carry)
        if state.ema is not None:
            ema = update_ema(state.ema, state.params, updates, player.ema_decay)
            state = dataclasses.replace(state, ema=ema)
        return state, metrics, shared

    def kept(name: str, state: PlayerState, updates: jax.Array, view: View):
        """As `updated`, without an update: of the loss, XLA computes what it shares alone."""

        view = view._replace(carry=state.carry)

        def share(part: tuple[Any, Any]):
            rows, shared = _split_rows(part, mesh)
            _, seen = objective.players[name].loss(
                state.params, view._replace(rows=rows, shared=shared)
            )
            return (), dict(seen.shared)

        _, shared = accumulate(share, (view.rows, view.shared), accumulation)
        _, shapes, _ = jax.eval_shape(functools.partial(updated, name), state, updates, view)
        metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return state, metrics, shared

    def turn(name: str, state: PlayerState, step: jax.Array, view: View):
        """A player's part of the step, in which it updates or is kept."""
        player = objective.players[name]
        updates = player.updates_before(step)
        if player.every == 1 and not player.skip_every:
            return updated(name, state, updates, view)
        update, keep = functools.partial(updated, name), functools.partial(kept, name)
        return jax.lax.cond(player.updates(step), update, keep, state, updates, view)

    def train_step(state: TrainState, frozen: Frozen, batch: Batch):
        players, metrics, shared = dict(state.players), {}, {}

        def keys(role: Role) -> jax.Array:
            return role_key(state.key, state.step, role)

        with program_for(mesh):
            rows = parts_of(_split_rows(objective.rows(keys, frozen, batch), mesh), accumulation)
            for name in objective.players:
                params = {other: player.params for other, player in players.items()}
                view = View(params, frozen, rows, shared)
                players[name], metrics[name], more = turn(name, players[name], state.step, view)
                shared = shared | more
        return TrainState(state.step + 1, players, state.key), metrics

    return train_step


def _split_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Splits rows over the devices: left alone, XLA keeps what is drawn here whole on each."""
    if mesh is None:
        return tree
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.map(
        lambda leaf: constrain(leaf, batch_sharding(mesh)) if leaf.ndim else leaf, tree
    )


def parts_of(rows: Any, parts: int) -> Any:
    """Rows as micro-batches: each array [B, ...] as [parts, B / parts, ...], scalars repeated.

    `parts` divides the leading dimension of each array. One part stays as it is.
    """
    if parts == 1:
        return rows
    # Rows that belong together, as those of join_pairs, stay in one part.
    groups = math.gcd(*(len(leaf) for leaf in jax.tree.leaves(rows) if leaf.ndim))

    def split(leaf: jax.Array) -> jax.Array:
        if not leaf.ndim:
            return jnp.broadcast_to(leaf, (parts,))
        # The leading dimension stays outermost until moved, so each device keeps its own rows.
        leaf = leaf.reshape(groups // parts, parts, len(leaf) // groups, *leaf.shape[1:])
        leaf = jnp.moveaxis(leaf, 1, 0)
        return leaf.reshape(parts, -1, *leaf.shape[3:])

    return jax.tree.map(split, rows)


def accumulate(function: Callable[[Any], tuple[Any, Any]], rows: Any, parts: int) -> Any:
    """`function` over micro-batches, one at a time in a scan.

    Args:
      function: a micro-batch -> (trees that are averaged, trees that are kept apart).
      rows: of `parts_of`, or what this gave of them.

    Returns:
      (the means, the others of each micro-batch [parts, ...]); those of `function` for one part.
    """
    if parts == 1:
        return function(rows)
    first = jax.tree.map(lambda leaf: leaf[0], rows)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)[0]
    )

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        summed, apart = function(part)
        return jax.tree.map(jnp.add, total, summed), apart

    total, apart = jax.lax.scan(add, zeros, rows)
    return jax.tree.map(lambda leaf: leaf / parts, total), apart


def jit_step(
    step: Step, mesh: Mesh, state_shardings: Any, frozen_shardings: Any, batch_shardings: Any = None
):
    """The step as one program: state donated and sharded as it came, metrics on every device.

    Where batch_shardings is None the batch stays as it is given.
    """
    return jax.jit(
        step,
        in_shardings=(state_shardings, frozen_shardings, batch_shardings),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
