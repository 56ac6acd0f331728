"""The optimiser of a player: AdamW with a clip and a warm-up."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import optax

from dmd_jax.method.types import Params
from dmd_jax.options import option


class Optimizer(NamedTuple):
    """A gradient transformation, and its learning rate for the metrics."""

    transformation: optax.GradientTransformation
    learning_rate: optax.Schedule  # of the updates done


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """The settings of a player's optimiser, with the paper's values for CIFAR-10."""

    learning_rate: float = option(5e-5, least=0, when_asked=True)
    warmup_steps: int = option(500, least=0)
    # What these are: the player's own updates, or steps, of which a player that is updated on each
    # n-th one needs only every n-th, as in DMD2's code.
    warmup_counts: str = option("updates", choices=("updates", "steps"))
    weight_decay: float = option(0.01, least=0)
    beta1: float = option(0.9, least=0, below=1)
    beta2: float = option(0.999, least=0, below=1)
    clip_norm: float = option(10.0, above=0)  # of the gradient, over all its leaves


def adamw(settings: AdamW, *, every: int = 1) -> Optimizer:
    """The paper's optimiser: global-norm clip, then AdamW with a linear warm-up from zero.

    Equal to torch's clip_grad_norm_, AdamW and a constant schedule with warm-up. The first update
    of a warm-up has learning rate 0.

    Args:
      every: the player is updated on each n-th step.
    """
    steps = every if settings.warmup_counts == "steps" else 1
    learning_rate = warmup(settings.learning_rate, settings.warmup_steps, steps)
    transformation = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate,
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=_decays,
        ),
    )
    return Optimizer(transformation, learning_rate)


def warmup(learning_rate: float, warmup_steps: int, steps_per_update: int = 1) -> optax.Schedule:
    """Updates done -> learning_rate * min(1, steps_per_update * updates done / warmup_steps).

    Args:
      steps_per_update: n for a network that is updated on each n-th step and whose schedule is
        counted in steps.
    """
    if warmup_steps == 0:
        return optax.constant_schedule(learning_rate)
    rate = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return rate if steps_per_update == 1 else lambda updates: rate(steps_per_update * updates)


def _decays(params: Params) -> Any:
    """False for the Fourier embedding's frequencies: constants, though checkpoints hold them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freqs" not in jax.tree_util.keystr(path), params
    )
