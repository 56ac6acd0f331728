"""A config's distillation: its setting, its state at the start, and its one step."""

from __future__ import annotations

from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import state
from dmd_jax.distillation.labels import label_method, label_setting
from dmd_jax.distillation.setting import Method, Setting
from dmd_jax.distillation.text import text_method, text_setting
from dmd_jax.experiment import (
    computation_of,
    fake_weight_of,
    generator_steps_per_update,
    loss_options,
)
from dmd_jax.models import build_denoiser
from dmd_jax.train_step import Step, make_train_step
from dmd_jax.weights import Weights, denoiser_of

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


def method_of(config: ConfigDict) -> Method:
    """The functions and the shapes of the config's distillation, from the config alone.

    Raises:
      UserError: a value is impossible.
    """
    denoiser = build_denoiser(
        config.network.to_dict(), remat=config.remat, **computation_of(config)
    )
    return (label_method if denoiser.cond_shape is None else text_method)(config, denoiser)


def setting_of(config: ConfigDict, teacher: Weights) -> Setting:
    """The setting that fits the teacher's network.

    Raises:
      UserError: data or weights that the config names are not there or do not fit, or a value is
        impossible.
    """
    denoiser = denoiser_of(teacher, remat=config.remat, **computation_of(config))
    make = label_setting if denoiser.cond_shape is None else text_setting
    return make(config, teacher, denoiser)


def optimizers_of(config: ConfigDict) -> Optimizers:
    """The generator's and the fake score's.

    Raises:
      UserError: config.warmup_counts is unknown.
    """
    return tuple(
        state.adamw(
            learning_rate=learning_rate,
            warmup_steps=config.warmup_steps,
            steps_per_update=steps_per_update,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            clip_norm=config.clip_norm,
        )
        for learning_rate, steps_per_update in (
            (config.learning_rate, generator_steps_per_update(config)),
            (config.fake_score_learning_rate, 1),
        )
    )


def initial_state(
    config: ConfigDict, method: Method, optimizers: Optimizers, teacher_params: Any
) -> state.TrainState:
    """Both networks as the teacher's copy."""
    params = method.network_params(teacher_params)
    return state.train_state(
        params,
        params,
        optimizer=optimizers[0],
        fake_optimizer=optimizers[1],
        use_ema=config.ema_decay > 0,
        seed=config.seed,
    )


def train_step_of(config: ConfigDict, method: Method, optimizers: Optimizers, mesh: Mesh) -> Step:
    """The step that a config, or one stage of it, asks for."""
    return make_train_step(
        method.networks,
        schedule=method.schedule,
        optimizer=optimizers[0],
        fake_optimizer=optimizers[1],
        learning_rate=state.warmup(
            config.learning_rate, config.warmup_steps, generator_steps_per_update(config)
        ),
        batch_size=config.batch_size,
        sample_shape=method.sample_shape,
        num_classes=method.num_classes,
        condition=method.condition,
        match_reference=config.match_reference,
        min_index=config.min_index,
        max_index=config.max_index,
        fake_weight=fake_weight_of(config),
        generator_every=config.generator_every,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
        perceptual=method.distance(config),
        mesh=mesh,
        loss_options=loss_options(config, method.schedule),
    )
