"""DMD2 (arXiv 2405.14867): matching without pairs, a GAN on the fake score, several steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method import losses, samplers
from dmd_jax.method.randomness import Role
from dmd_jax.method.schedules import NoiseLevel, few_step_indices, forward_diffusion
from dmd_jax.method.types import Params
from dmd_jax.models.heads import Head
from dmd_jax.objectives.data_rows import cond_of, fresh_cond, image_needs
from dmd_jax.objectives.denoising import fake_score_loss
from dmd_jax.objectives.draws import Draws, check_bins, draw
from dmd_jax.objectives.matching import Networks, matching_loss
from dmd_jax.objectives.objective import Batch, Keys, Need, Objective, Player, Seen, View, need
from dmd_jax.objectives.optimizers import Optimizer
from dmd_jax.objectives.pictures import one_by_one, shown
from dmd_jax.options import option
from dmd_jax.teachers.family import abstract_tokens
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens


class SampleWeight(NamedTuple):
    """What each sample's matching gradient is multiplied by."""

    # (logits [B], levels, carry) -> (the factors [B], the next carry)
    weights: Callable[[jax.Array, NoiseLevel, Any], tuple[jax.Array, Any]]
    carry: Callable[[Params], Any] | None  # as for Player


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD2:
    """The settings of the method, or of a stage of a run, with the paper's values for ImageNet."""

    batch_size: int  # B, the samples of every loss, and the real images of the GAN
    matching_weight: float = option(1.0, least=0)
    # Of the GAN's two losses beside the generator's and the fake score's; 0 leaves it out.
    gan_weight: float = option(3e-3, least=0, staged=True)
    gan_fake_weight: float = option(1e-2, least=0, staged=True)
    weighting: str = option("normalized", choices=losses.WEIGHTINGS)
    alpha_factor: bool = option(False)  # Eq. 8's alpha_t, as for DMD
    epsilon: float = option(0.0, least=0)  # added to Eq. 8's denominator; FastGen has 1e-6
    # Bins of the schedule that the matching loss draws from, both included.
    min_index: int = option(20, least=0, staged=True)
    max_index: int = option(980, least=0, staged=True)
    gan_max_index: int = option(999, least=0)  # the GAN draws from 0 to this one
    # Whose bottleneck the head sees: FastGen's is the frozen teacher's.
    gan_features: str = option("fake_score", choices=("fake_score", "teacher"))
    generator_every: int = option(5, least=1)  # the generator updates on each n-th step
    # Whether the fake score is left alone on the steps that update the generator, as in FastGen.
    alternate: bool = option(False)
    num_steps: int = option(1, least=1)  # K, of the generator; it divides the schedule's levels
    # What the later of several steps learn on: what the generator's own earlier steps lead to, or
    # noised real images.
    backward_simulation: bool = option(True)
    ema_decay: float = option(0.0, least=0, below=1)  # of the generator's average; 0 keeps none


class _Parts(NamedTuple):
    """What the functions of the objective have in common."""

    settings: DMD2
    teacher: Teacher
    networks: Networks
    fake_weight: Callable[[NoiseLevel], jax.Array]
    weigh: SampleWeight | None
    preview_key: jax.Array

    @property
    def has_gan(self) -> bool:
        settings = self.settings
        return bool(settings.gan_weight or settings.gan_fake_weight or self.weigh)

    @property
    def reads_images(self) -> bool:
        settings = self.settings
        return self.has_gan or (settings.num_steps > 1 and not settings.backward_simulation)


def dmd2(
    settings: DMD2,
    teacher: Teacher,
    networks: Networks,
    *,
    init: Mapping[str, Callable[[Frozen, jax.Array], Params]],
    optimizers: Mapping[str, Optimizer],
    fake_weight: Callable[[NoiseLevel], jax.Array] = losses.edm_weight,
    preview_key: jax.Array,
    weigh: SampleWeight | None = None,
) -> Objective:
    """The players "generator" and "fake_score"; the latter's tree holds the head as well.

    The generator descends the matching loss plus the GAN's, whose gradient goes through the head
    and the encoder of the fake score to the samples. The fake score then descends the denoising
    loss on the same samples, and with its head the GAN's on these and on real images. Samples and
    real images are noised before the head sees them, each to a level of its own.

    Args:
      networks: the function `teacher` in it takes all that the step only reads, not only the
        teacher's own parameters.
      init, optimizers: of both players, by name; the head is made here.
      fake_weight: level -> [B], of the fake score's denoising loss.
      weigh: of the samples' matching gradients, by the head at the scores' own x_t, at which the
        generator's part of the GAN is then as well; None for 1.

    Raises:
      UserError: settings that are impossible, or a teacher without features for a head.
    """
    parts = _Parts(settings, teacher, networks, fake_weight, weigh, preview_key)
    _check(parts)
    every = settings.generator_every

    def with_head(frozen: Frozen, key: jax.Array) -> Params:
        params = {"network": init["fake_score"](frozen, key)}
        if teacher.features is None:
            return params
        # Whether or not this stage has a GAN, so that the state is the same in all of a run.
        one = abstract_tokens(teacher, 1)
        features = jax.eval_shape(functools.partial(_features_of_one, parts), frozen, one)
        head = Head().init(key, jnp.zeros(features.shape, features.dtype))
        return params | {"head": head["params"]}

    return Objective(
        players={
            "generator": Player(
                init=init["generator"],
                loss=functools.partial(_generator, parts),
                optimizer=optimizers["generator"],
                every=every,
                ema_decay=settings.ema_decay,
                carry=weigh.carry if weigh else None,
            ),
            "fake_score": Player(
                init=with_head,
                loss=functools.partial(_fake_score, parts),
                optimizer=optimizers["fake_score"],
                skip_every=every if settings.alternate else 0,
            ),
        },
        kept="generator",
        batch_size=settings.batch_size,
        needs=_needs(parts),
        rows=functools.partial(_rows, parts),
        pictures=functools.partial(_pictures, parts),
    )


def _check(parts: _Parts) -> None:
    settings, bins = parts.settings, parts.teacher.schedule.num_levels
    check_bins(settings.min_index, settings.max_index, parts.teacher.schedule)
    if settings.gan_max_index >= bins:
        raise UserError(f"gan_max_index={settings.gan_max_index}; expected less than {bins}")
    if not settings.matching_weight and not settings.gan_weight:
        raise UserError(
            "matching_weight and gan_weight are 0; expected one of them to be more, as the "
            "generator learns from nothing else"
        )
    if parts.has_gan and not settings.gan_fake_weight:
        raise UserError("gan_fake_weight is 0; expected more, as the head learns from nothing else")
    if settings.alternate and settings.generator_every < 2:
        raise UserError("alternate is True; expected generator_every of at least 2 with it")
    few_step_indices(bins, settings.num_steps)
    if parts.has_gan and parts.teacher.features is None:
        raise UserError(
            "the teacher's network has no features for a head; expected gan_weight and "
            "gan_fake_weight 0, or another network"
        )


def _needs(parts: _Parts) -> dict[str, Need]:
    """Real images where something is learned from them, prompts where tokens cannot be drawn."""
    settings, teacher, needs = parts.settings, parts.teacher, {}
    if parts.reads_images:
        needs |= image_needs(teacher, settings.batch_size)
    if teacher.draw_tokens is None:
        needs["prompts"] = need(settings.batch_size, teacher.tokens)
    return needs


def _rows(parts: _Parts, keys: Keys, frozen: Frozen, batch: Batch) -> dict[str, Any]:
    """What the generator sees, the real images, and the draws of all losses."""
    settings, teacher = parts.settings, parts.teacher
    shape = (settings.batch_size, *teacher.sample_shape)

    def drawn(role: Role, low: int = 0, high: int | None = None) -> Draws:
        return draw(keys(role), shape, schedule=teacher.schedule, min_index=low, max_index=high)

    rows = {
        "z": jax.random.normal(keys(Role.LATENTS), shape, jnp.float32),
        "cond": fresh_cond(teacher, keys(Role.LABELS), frozen, batch, settings.batch_size),
        "matching": drawn(Role.MATCHING, settings.min_index, settings.max_index),
        "fake": drawn(Role.FAKE_SCORE),
    }
    if "images" in batch:
        rows["real"] = batch["images"]["x0"]
        rows["real_cond"] = cond_of(teacher, frozen, batch["images"])
    if parts.has_gan:
        for role in (Role.GAN_GENERATOR, Role.GAN_FAKE, Role.GAN_REAL):
            rows[role.name.lower()] = drawn(role, 0, settings.gan_max_index)
    if settings.num_steps > 1:
        rows["step"] = jax.random.randint(keys(Role.STEP), (), 0, settings.num_steps, jnp.int32)
        rows["step_noise"] = _step_noise(settings, keys(Role.STEP_NOISE), shape)
        if not settings.backward_simulation:
            rows["cond"] = rows["real_cond"]
    return rows


def _step_noise(settings: DMD2, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The noise before each step but the first, [B, K - 1, ...], as `few_step` draws it."""
    noise = [samplers.few_step_noise(key, shape, step) for step in range(1, settings.num_steps)]
    return jnp.stack(noise, axis=1)


def _generate(parts: _Parts, params: Params, rows: Mapping[str, Any]) -> jax.Array:
    """The generator's samples [B, ...], of the step that is learned where it has several."""
    settings, teacher, z, cond = parts.settings, parts.teacher, rows["z"], rows["cond"]
    if settings.num_steps == 1:
        return parts.networks.generate(params, z, cond)
    if settings.backward_simulation:
        x_t, level = samplers.few_step_input(
            *(teacher.denoise, params, z, cond),
            schedule=teacher.schedule,
            num_steps=settings.num_steps,
            step=rows["step"],
            noise=lambda step: jnp.take(rows["step_noise"], step - 1, axis=1),
        )
    else:
        schedule = teacher.schedule
        indices = jnp.asarray(few_step_indices(schedule.num_levels, settings.num_steps))
        level = schedule.level(jnp.full(z.shape[:1], indices[rows["step"]]))
        noised = forward_diffusion(rows["real"], rows["step_noise"][:, 0], level)
        x_t = jnp.where(rows["step"] == 0, schedule.prior_scale * z, noised)
    return teacher.denoise(params, x_t, level, cond)


def _logits(
    parts: _Parts, fake_score: Params, frozen: Frozen, x: jax.Array, draws: Draws, cond: Any
) -> jax.Array:
    """The head's logits [B] of images, noised as drawn."""
    network = fake_score["network"]
    if parts.settings.gan_features == "teacher":
        network = frozen["network"]
    x_t = forward_diffusion(x, draws.noise, draws.level)
    features = parts.teacher.features(network, x_t, draws.level, cond)
    return Head().apply({"params": fake_score["head"]}, features)


def _features_of_one(parts: _Parts, frozen: Frozen, tokens: Tokens) -> jax.Array:
    """The features of one image, for their shape."""
    teacher = parts.teacher
    cond = teacher.null(frozen) if teacher.draw_tokens is None else teacher.encode(frozen, tokens)
    x_t = jnp.zeros((1, *teacher.sample_shape))
    return teacher.features(frozen["network"], x_t, teacher.schedule.generator_level(1), cond)


def _matching(
    parts: _Parts,
    x: jax.Array,
    fake_score: Params,
    frozen: Frozen,
    rows: Mapping[str, Any],
    sample_weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """`matching_loss` with the settings."""
    settings = parts.settings
    return matching_loss(
        *(x, rows["matching"], rows["cond"]),
        networks=parts.networks,
        teacher_params=frozen,
        fake_score_params=fake_score["network"],
        sample_weight=sample_weight,
        weighting=settings.weighting,
        alpha_factor=settings.alpha_factor,
        epsilon=settings.epsilon,
    )


def _generator(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    settings, rows, fake_score = parts.settings, view.rows, view.players["fake_score"]
    x = _generate(parts, params, rows)
    metrics, weight, carry = {}, None, view.carry
    loss = jnp.zeros(())
    if parts.has_gan:
        draws = rows["matching" if parts.weigh else "gan_generator"]
        logits = _logits(parts, fake_score, view.frozen, x, draws, rows["cond"])
        metrics["loss_gan_generator"] = losses.gan_generator_loss(logits)
        loss = settings.gan_weight * metrics["loss_gan_generator"]
        if parts.weigh:
            weight, carry = parts.weigh.weights(jax.lax.stop_gradient(logits), draws.level, carry)
            metrics["mean_logit"] = logits.mean()
    if settings.matching_weight:
        matching, aux = _matching(parts, x, fake_score, view.frozen, rows, weight)
        loss = loss + settings.matching_weight * matching
        metrics |= aux["metrics"]
    metrics["loss_generator"] = loss
    return loss, Seen(metrics, {"x": jax.lax.stop_gradient(x)}, carry)


def _fake_score(parts: _Parts, params: Params, view: View) -> tuple[jax.Array, Seen]:
    settings, rows, x = parts.settings, view.rows, view.shared["x"]
    loss = fake_score_loss(
        params["network"],
        rows["fake"],
        {"x0": x, "cond": rows["cond"]},
        denoise=parts.networks.fake_score,
        weight=parts.fake_weight,
    )
    metrics = {"loss_fake_score": loss}
    if parts.has_gan:
        logits = functools.partial(_logits, parts, params, view.frozen)
        fake = logits(x, rows["gan_fake"], rows["cond"])
        real = logits(rows["real"], rows["gan_real"], rows["real_cond"])
        metrics["loss_head"] = losses.gan_head_loss(real, fake)
        metrics["head_accuracy"] = ((real > 0).mean() + (fake < 0).mean()) / 2
        loss = loss + settings.gan_fake_weight * metrics["loss_head"]
    return loss, Seen(metrics)


def _pictures(
    parts: _Parts, players: Mapping[str, Params], frozen: Frozen, batch: Batch, count: int
) -> dict[str, jax.Array]:
    """Samples and the images behind the matching loss, always of the same latents and levels."""
    settings, teacher = parts.settings, parts.teacher
    shape = (count, *teacher.sample_shape)
    latents_key, draw_key, step_key = jax.random.split(parts.preview_key, 3)
    rows = {
        "z": jax.random.normal(latents_key, shape, jnp.float32),
        "cond": cond_of(teacher, frozen, batch.get("prompts", batch.get("images"))),
        "matching": draw(
            *(draw_key, shape),
            schedule=teacher.schedule,
            min_index=settings.min_index,
            max_index=settings.max_index,
        ),
        "key": jax.random.split(step_key, count),
    }

    def of_one(example: dict[str, Any]) -> dict[str, jax.Array]:
        x = samplers.few_step(
            *(teacher.denoise, players["generator"], example["z"], example["cond"]),
            schedule=teacher.schedule,
            num_steps=settings.num_steps,
            key=example["key"][0],
        )
        _, aux = _matching(parts, x, players["fake_score"], frozen, example)
        return shown({"x": x} | aux["pictures"], example["matching"], teacher, frozen)

    return one_by_one(of_one, rows)
