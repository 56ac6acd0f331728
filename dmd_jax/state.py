"""The train states: plain pytrees, made from a teacher, with every key a function of the step."""

from __future__ import annotations

import enum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dmd_jax.types import Params


class Role(enum.IntEnum):
    """What a random key is for; keys of one seed and step, or index, differ by role.

    A role keeps its number, which is part of what a seed gives; further roles are appended.
    """

    LATENTS = 0
    LABELS = 1
    MATCHING = 2
    FAKE_SCORE = 3
    TEACHER = 4
    INIT = 5
    PREVIEW = 6
    PAIR_LATENTS = 7
    PAIR_LABELS = 8
    SAMPLER_NOISE = 9  # of `evaluate` and `sample`; the samplers of pairs add none
    SAMPLE_LATENTS = 10  # of `evaluate` and `sample`, which are never those of pairs
    SAMPLE_LABELS = 11


@flax.struct.dataclass
class ModelState:
    """A trained network: its parameters and its optimiser's state."""

    params: Params  # nested dict of float32 arrays
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """Distillation: what a step changes. The teacher is not in it."""

    step: jax.Array  # int32 [], steps done
    generator: ModelState
    fake_score: ModelState
    ema: Params | None  # of the generator's parameters, or None
    key: jax.Array  # uint32 [2], the seed's key as data


@flax.struct.dataclass
class TeacherState:
    """Teacher training: what a step changes."""

    step: jax.Array  # int32 [], steps done
    teacher: ModelState
    ema: Params | None  # of the teacher's parameters, or None
    key: jax.Array  # uint32 [2], the seed's key as data


def key_data(seed: int) -> jax.Array:
    """The base key of a state, as data that any checkpoint format can hold."""
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def role_key(base: jax.Array, step: jax.Array | int, role: Role) -> jax.Array:
    """The key of (seed, step, role), so that a resumed run draws what the other would have."""
    key = jax.random.wrap_key_data(base, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, step), int(role))


def adamw(
    *,
    learning_rate: float,
    warmup_steps: int = 500,
    steps_per_update: int = 1,
    weight_decay: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.999,
    clip_norm: float = 10.0,
) -> optax.GradientTransformation:
    """The paper's optimiser: global-norm clip, then AdamW with a linear warm-up from zero.

    Equal to torch's clip_grad_norm_, AdamW and a constant schedule with warm-up. The first update
    of a warm-up has learning rate 0.

    Args:
      warmup_steps, steps_per_update: of `warmup`.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            warmup(learning_rate, warmup_steps, steps_per_update),
            b1=beta1,
            b2=beta2,
            weight_decay=weight_decay,
            mask=_decays,
        ),
    )


def _decays(params: Params) -> Any:
    """False for the Fourier embedding's frequencies: constants, though checkpoints hold them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freqs" not in jax.tree_util.keystr(path), params
    )


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


def model_state(params: Params, optimizer: optax.GradientTransformation) -> ModelState:
    """A network before its first update."""
    return ModelState(params=params, opt_state=optimizer.init(params))


def train_state(
    generator_params: Params,
    fake_score_params: Params,
    *,
    optimizer: optax.GradientTransformation,
    fake_optimizer: optax.GradientTransformation,
    use_ema: bool,
    seed: int,
) -> TrainState:
    """The state before the first step; in the method both networks start as the teacher's copy."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=model_state(generator_params, optimizer),
        fake_score=model_state(fake_score_params, fake_optimizer),
        ema=generator_params if use_ema else None,
        key=key_data(seed),
    )


def apply_gradients(
    model: ModelState, gradients: Params, optimizer: optax.GradientTransformation
) -> ModelState:
    """One optimiser update."""
    updates, opt_state = optimizer.update(gradients, model.opt_state, model.params)
    return ModelState(params=optax.apply_updates(model.params, updates), opt_state=opt_state)


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """ema + (1 - d)(params - ema), with d = min(decay, (1 + step) / (10 + step)).

    The cap lets the average forget the start in a run that is short beside 1 / (1 - decay).
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), ema, params)
