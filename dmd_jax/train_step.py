"""The one step of the method: Algorithm 1 as a pure function of the state, jitted and sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmd_jax import objective
from dmd_jax.objective import Networks
from dmd_jax.schedules import NoiseLevel, NoiseSchedule
from dmd_jax.sharding import batch_sharding, program_for, replicated
from dmd_jax.state import ModelState, Role, TrainState, apply_gradients, role_key, update_ema
from dmd_jax.types import Params

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# What each step reports; the rest is of the steps that update the generator.
EVERY_STEP = ("loss_fake_score", "grad_norm_fake_score", "learning_rate")

Step = Callable[[TrainState, Params, Params, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    networks: Networks,
    *,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    fake_optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    batch_size: int,
    sample_shape: tuple[int, ...],
    num_classes: int = 0,
    condition: Callable[[Params, Batch], tuple[Any, Any]] | None = None,
    match_reference: bool = False,
    min_index: int = 20,
    max_index: int = 980,
    fake_weight: Callable[[NoiseLevel], jax.Array] = objective.losses.edm_weight,
    generator_every: int = 1,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    perceptual: Callable[[Params, jax.Array, jax.Array], jax.Array] | None = None,
    mesh: Mesh | None = None,
    loss_options: dict[str, Any] | None = None,
) -> Step:
    """Builds `train_step(state, teacher_params, perceptual_params, batch) -> (state, metrics)`.

    Algorithm 1: x = G(z); G descends the matching loss plus the regression loss; the fake score
    descends the denoising loss on the same x, so on samples of the generator before its update.

    Args:
      networks: the three roles' functions.
      optimizer, fake_optimizer: of the generator and of the fake score.
      learning_rate: the generator's schedule, for the metrics.
      batch_size: B, the samples of the matching loss; `sample_shape` is one sample's, without B.
      num_classes: fresh labels are uniform over them; 0 gives every network the condition None.
      condition: (teacher_params, batch) -> the conditions of the fresh latents and of the pairs,
        where they come with the batch, as text does; None where labels are the condition.
      match_reference: the R pairs' latents are among the B, so B - R are fresh; otherwise all are.
      min_index, max_index: bins of the matching loss, both included.
      fake_weight: level -> [B], the denoising loss's weight.
      generator_every: the generator updates on each n-th step, the fake score on all.
      accumulation: micro-batches of a step; they change the memory needed, not the result.
      ema_decay: of the generator's average; 0 where the state has none.
      perceptual: (perceptual_params, x, y) -> [B], the regression's distance; None is L2.
      mesh: over whose data and fsdp axes each device works on its own rows.
      loss_options: further options of `objective.generator_loss`.

    The step's batch holds "z_ref", "y_ref" [R, ...] and "label" int32 [R], or what `condition`
    takes in its place.
    """
    options = dict(loss_options or {})

    def latents(state: TrainState, teacher_params: Params, batch: Batch) -> dict[str, Any]:
        """What the generator sees: fresh latents, the pairs', and their conditions."""
        count = batch_size - (len(batch["z_ref"]) if match_reference else 0)
        key = role_key(state.key, state.step, Role.LATENTS)
        z = jax.random.normal(key, (count, *sample_shape), jnp.float32)
        if condition is not None:
            cond, cond_ref = condition(teacher_params, batch)
        elif num_classes:
            key = role_key(state.key, state.step, Role.LABELS)
            cond = jax.random.randint(key, (count,), 0, num_classes, jnp.int32)
            cond_ref = batch["label"]
        else:
            cond, cond_ref = None, None
        if not match_reference:
            return {"z": z, "cond": cond, "z_ref": batch["z_ref"], "cond_ref": cond_ref}
        join = objective.join_pairs
        return {"z": join(z, batch["z_ref"]), "cond": jax.tree.map(join, cond, cond_ref)}

    def draw_all(state: TrainState, teacher_params: Params, batch: Batch) -> dict[str, Any]:
        """Everything that a step sees, for the whole batch: micro-batches are parts of it."""
        shape = (batch_size, *sample_shape)
        return latents(state, teacher_params, batch) | {
            "y_ref": batch["y_ref"],
            "matching": objective.draw(
                role_key(state.key, state.step, Role.MATCHING),
                shape,
                schedule=schedule,
                min_index=min_index,
                max_index=max_index,
            ),
            "fake": objective.draw(
                role_key(state.key, state.step, Role.FAKE_SCORE), shape, schedule=schedule
            ),
        }

    def split_rows(part: Any) -> Any:
        """Splits rows over the devices: left alone, XLA keeps what is drawn here whole on each."""
        if mesh is None:
            return part
        return jax.lax.with_sharding_constraint(part, batch_sharding(mesh))

    def gradients(state: TrainState, teacher_params, perceptual_params, update, part):
        """Both networks' gradients and metrics on one micro-batch."""
        part = split_rows(part)
        distance = None
        if perceptual is not None:
            distance = lambda x, y: perceptual(perceptual_params, x, y)  # noqa: E731

        def of_generator(params):
            (_, aux), grads = jax.value_and_grad(objective.generator_loss, has_aux=True)(
                params,
                part["matching"],
                part,
                networks=networks,
                teacher_params=teacher_params,
                fake_score_params=state.fake_score.params,
                distance=distance,
                **options,
            )
            return aux["x"], grads, aux["metrics"]

        def samples_only(params):
            shapes = jax.eval_shape(of_generator, params)[1:]
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return networks.generate(params, part["z"], part["cond"]), *zeros

        if generator_every == 1:
            x, generator_grads, metrics = of_generator(state.generator.params)
        else:
            x, generator_grads, metrics = jax.lax.cond(
                update, of_generator, samples_only, state.generator.params
            )
        fake_loss, fake_grads = jax.value_and_grad(objective.fake_score_loss)(
            state.fake_score.params,
            part["fake"],
            {"x0": x, "cond": part["cond"]},
            denoise=networks.fake_score,
            weight=fake_weight,
        )
        return generator_grads, fake_grads, metrics | {"loss_fake_score": fake_loss}

    def train_step(state, teacher_params, perceptual_params, batch):
        update = state.step % generator_every == 0
        with program_for(mesh):
            everything = split_rows(draw_all(state, teacher_params, batch))
            generator_grads, fake_grads, metrics = accumulate(
                lambda part: gradients(state, teacher_params, perceptual_params, update, part),
                everything,
                accumulation,
            )
        metrics["grad_norm_generator"] = optax.tree.norm(generator_grads)
        metrics["grad_norm_fake_score"] = optax.tree.norm(fake_grads)
        metrics["learning_rate"] = learning_rate(state.step // generator_every)

        def updated(generator: ModelState, ema: Params | None):
            generator = apply_gradients(generator, generator_grads, optimizer)
            if ema is not None:
                ema = update_ema(ema, generator.params, state.step // generator_every, ema_decay)
            return generator, ema

        if generator_every == 1:
            generator, ema = updated(state.generator, state.ema)
        else:
            generator, ema = jax.lax.cond(
                update, updated, lambda *kept: kept, state.generator, state.ema
            )
        fake_score = apply_gradients(state.fake_score, fake_grads, fake_optimizer)
        state = TrainState(state.step + 1, generator, fake_score, ema, state.key)
        return state, metrics

    return train_step


def accumulate(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """The mean of `function` over `parts` equal micro-batches, one at a time in a scan.

    `parts` divides the leading dimension of each leaf.
    """
    if parts == 1:
        return function(batch)

    # Rows that belong together, as those of join_pairs, stay in one part.
    groups = math.gcd(*(len(leaf) for leaf in jax.tree.leaves(batch)))

    def split(leaf: jax.Array) -> jax.Array:
        # The leading dimension stays outermost until moved, so each device keeps its own rows.
        leaf = leaf.reshape(groups // parts, parts, len(leaf) // groups, *leaf.shape[1:])
        leaf = jnp.moveaxis(leaf, 1, 0)
        return leaf.reshape(parts, -1, *leaf.shape[3:])

    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)
    )
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, batch
    )
    return jax.tree.map(lambda leaf: leaf / parts, total)


def jit_step(
    step: Step,
    mesh: Mesh,
    state_shardings,
    teacher_shardings,
    perceptual_shardings=None,
    batch_shardings=None,
):
    """The step as one program: state donated and sharded as it came, metrics on every device.

    Where batch_shardings is None the batch stays as it is given.
    """
    return jax.jit(
        step,
        in_shardings=(
            state_shardings,
            teacher_shardings,
            perceptual_shardings,
            batch_shardings,
        ),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
