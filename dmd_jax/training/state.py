"""The train state: a plain pytree of players, with every key a function of the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from dmd_jax.method.randomness import key_data
from dmd_jax.method.types import Params
from dmd_jax.storage.checkpoints import Former


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class PlayerState:
    """A trained tree: its parameters, its optimiser's state, and their average."""

    params: Params  # nested dict of float32 arrays
    opt_state: optax.OptState
    ema: Params | None  # of the parameters, or None
    carry: Any = ()  # what the player's loss left for its next update

    @property
    def averaged(self) -> Params:
        """The average, or the parameters where none is kept."""
        return self.params if self.ema is None else self.ema

    def tree_flatten_with_keys(self):
        # Without a carry where there is none, as checkpoints of earlier versions have it.
        none = isinstance(self.carry, tuple) and not self.carry
        names = ("params", "opt_state", "ema") + (() if none else ("carry",))
        return [(GetAttrKey(name), getattr(self, name)) for name in names], names

    @classmethod
    def tree_unflatten(cls, names, children) -> PlayerState:
        return cls(**dict(zip(names, children)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. What it only reads, as the teacher, is not in it."""

    step: jax.Array  # int32 [], steps done
    players: dict[str, PlayerState]
    key: jax.Array  # uint32 [2], the seed's key as data


def train_state(
    params: Mapping[str, Params],
    transformations: Mapping[str, optax.GradientTransformation],
    *,
    averaged: Collection[str] = (),
    carries: Mapping[str, Any] = {},
    seed: int,
) -> TrainState:
    """The state before the first step.

    Args:
      params, transformations: of each player, by name.
      averaged: the players that keep an average of their parameters.
      carries: what the losses of players are given at their first update.
    """
    players = {
        name: PlayerState(
            tree,
            transformations[name].init(tree),
            tree if name in averaged else None,
            carries.get(name, ()),
        )
        for name, tree in params.items()
    }
    return TrainState(step=jnp.zeros((), jnp.int32), players=players, key=key_data(seed))


def apply_gradients(
    player: PlayerState,
    gradients: Params,
    transformation: optax.GradientTransformation,
    carry: Any = (),
) -> PlayerState:
    """One optimiser update, and the next carry of the player's loss; the average stays."""
    updates, opt_state = transformation.update(gradients, player.opt_state, player.params)
    params = optax.apply_updates(player.params, updates)
    return dataclasses.replace(player, params=params, opt_state=opt_state, carry=carry)


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """ema + (1 - d)(params - ema), with d = min(decay, (1 + step) / (10 + step)).

    The cap lets the average forget the start in a run that is short beside 1 / (1 - decay).
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)


def former_layout(state: TrainState) -> dict[str, Any]:
    """The tree that checkpoints have, in place of a TrainState, which know no players."""
    tree: dict[str, Any] = {"step": state.step, "key": state.key, "ema": None}
    for name, player in state.players.items():
        tree[name] = {"params": player.params, "opt_state": player.opt_state}
        if player.ema is not None:
            tree["ema"] = player.ema
    return tree


def of_former_layout(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state that a tree of `former_layout` holds.

    Args:
      like: a state with the same players, which says whose the average is.
    """
    players = {
        name: PlayerState(
            tree[name]["params"],
            tree[name]["opt_state"],
            None if player.ema is None else tree["ema"],
        )
        for name, player in like.players.items()
    }
    return TrainState(tree["step"], players, tree["key"])


# Of checkpoints that know no players.
WITHOUT_PLAYERS = Former(lambda found: "players" not in found, former_layout, of_former_layout)
