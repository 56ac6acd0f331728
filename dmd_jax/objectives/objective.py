"""What an objective is to the step, the loop and the commands: players, their losses, and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from dmd_jax.errors import UserError
from dmd_jax.method.randomness import Role
from dmd_jax.method.types import Params
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.teachers.teacher import Frozen

# A batch of data: the arrays [R, ...] of each source, by the source's name.
Batch = Mapping[str, Mapping[str, jax.Array]]
# A role -> the key of (seed, step, role).
Keys = Callable[[Role], jax.Array]


class View(NamedTuple):
    """What a player's loss sees beside the player's own parameters."""

    # Each player's parameters: of those that come earlier in the step, after their update.
    players: Mapping[str, Params]
    frozen: Frozen  # what a step only reads
    rows: Any  # of this micro-batch, as Objective.rows made them
    shared: Mapping[str, Any]  # what the losses of earlier players shared on these rows
    carry: Any = ()  # what the player's own loss left for its next update


class Seen(NamedTuple):
    """What a loss gives beside its value."""

    metrics: Mapping[str, jax.Array] = {}  # scalars; micro-batches average them
    # For later players of the same step, whose gradients do not reach this one: arrays [B, ...].
    shared: Mapping[str, Any] = {}
    # What the loss leaves for its next update, of the carry's shapes; micro-batches average it.
    carry: Any = ()


Loss = Callable[[Params, View], tuple[jax.Array, Seen]]


class Player(NamedTuple):
    """One trained tree of parameters."""

    # (frozen, key of the role INIT) -> the parameters before the first step. Each player of an
    # objective is given the same key.
    init: Callable[[Frozen, jax.Array], Params]
    loss: Loss
    optimizer: Optimizer
    every: int = 1  # updates on the first step and on each n-th after it
    ema_decay: float = 0.0  # of the average; 0 keeps none
    # Does not update on the first step and each n-th after it; 0 leaves none out.
    skip_every: int = 0
    # Its first parameters -> the carry of its loss before the first update, if it has one.
    carry: Callable[[Params], Any] | None = None

    def updates(self, step: jax.Array | int) -> jax.Array | bool:
        """Whether the player updates on the step after so many."""
        if self.skip_every:
            return (step % self.every == 0) & (step % self.skip_every != 0)
        return step % self.every == 0

    def updates_before(self, step: jax.Array | int) -> jax.Array | int:
        """How often the player has updated after so many steps."""
        updates = (step + self.every - 1) // self.every
        if self.skip_every:
            both = math.lcm(self.every, self.skip_every)
            updates = updates - (step + both - 1) // both
        return updates


class Need(NamedTuple):
    """What an objective reads of a source of data."""

    arrays: Mapping[str, jax.ShapeDtypeStruct]  # of the whole batch, [R, ...]
    every: int = 1  # they are used on the first step and on each n-th after it alone


class Objective(NamedTuple):
    """Trained networks that update in turn.

    A micro-batch is a part of every array in `rows`, whose leading dimensions the number of
    micro-batches divides; scalars are the same for all.
    """

    players: Mapping[str, Player]  # in the order in which a step updates them
    kept: str  # the player whose weights are what a run is for
    batch_size: int  # images of a step
    needs: Mapping[str, Need]  # by the source's name: "pairs", "prompts" or "images"
    rows: Callable[[Keys, Frozen, Batch], Any]  # (keys, frozen, batch) -> all rows
    # (players' parameters, frozen, count rows of its sources, or of "prompts" where it needs none,
    # count) -> images to look at, by name: [count, H, W, C] in [-1, 1].
    pictures: Callable[[Mapping[str, Params], Frozen, Batch, int], Mapping[str, jax.Array]]


def need(count: int, row: Mapping[str, jax.ShapeDtypeStruct], *, every: int = 1) -> Need:
    """The need of `count` rows, each of these arrays."""
    arrays = {
        name: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype) for name, leaf in row.items()
    }
    return Need(arrays, every)


def check_batch(
    batch: Mapping[str, Any], keys: tuple[str, ...], purpose: str, meanings: Mapping[str, str]
) -> None:
    """Raises a UserError that names the first key of these that the batch lacks.

    Args:
      meanings: what each key is, for the message.
    """
    for key in keys:
        if key not in batch:
            held = ", ".join(map(repr, batch)) or "nothing"
            raise UserError(
                f"the batch has no {key!r} but {held}; expected {meanings[key]}, for {purpose}"
            )
