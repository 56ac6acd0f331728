"""The step that trains a teacher: EDM's denoising loss on real images."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dmd_jax.losses import edm_weight
from dmd_jax.objective import draw_lognormal, fake_score_loss
from dmd_jax.schedules import NoiseLevel
from dmd_jax.state import (
    Role,
    TeacherState,
    apply_gradients,
    key_data,
    model_state,
    role_key,
    update_ema,
)
from dmd_jax.types import Denoise, Params


def make_teacher_step(
    denoise: Denoise,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    conditional: bool,
    p_mean: float,
    p_std: float,
    ema_decay: float,
    weight: Callable[[NoiseLevel], jax.Array] = edm_weight,
) -> Callable[[TeacherState, dict[str, jax.Array]], tuple[TeacherState, dict[str, jax.Array]]]:
    """Builds `teacher_step(state, batch) -> (state, metrics)`.

    ln(sigma) ~ N(p_mean, p_std^2) and the weight 1/sigma^2 + 1/sigma_data^2 (arXiv 2206.00364,
    table 1). The batch holds "x0" [B, ...] and "label" int32 [B].
    """

    def teacher_step(state: TeacherState, batch: dict[str, jax.Array]):
        key = role_key(state.key, state.step, Role.TEACHER)
        draws = draw_lognormal(key, batch["x0"].shape, mean=p_mean, std=p_std)
        cond = batch["label"] if conditional else None
        loss, grads = jax.value_and_grad(fake_score_loss)(
            state.teacher.params,
            draws,
            {"x0": batch["x0"], "cond": cond},
            denoise=denoise,
            weight=weight,
        )
        metrics = {
            "loss_denoising": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        teacher = apply_gradients(state.teacher, grads, optimizer)
        ema = update_ema(state.ema, teacher.params, state.step, ema_decay)
        return TeacherState(state.step + 1, teacher, ema, state.key), metrics

    return teacher_step


def teacher_state(
    params: Params, *, optimizer: optax.GradientTransformation, seed: int
) -> TeacherState:
    """The state before the first step."""
    return TeacherState(
        step=jnp.zeros((), jnp.int32),
        teacher=model_state(params, optimizer),
        ema=params,
        key=key_data(seed),
    )
