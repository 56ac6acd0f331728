"""`dmd-jax train`: distils the teacher into a one-step generator."""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import loop, state
from dmd_jax.arguments import add_run_arguments, run_config
from dmd_jax.data.loader import batches
from dmd_jax.data.pairs import PairSource
from dmd_jax.errors import UserError
from dmd_jax.experiment import (
    abstract_state,
    fake_weight_of,
    loss_options,
    mesh_of,
    perceptual_of,
    schedule_of,
    shardings_of,
    teacher_of,
)
from dmd_jax.objective import draw, generator_loss, one_architecture
from dmd_jax.pictures import grid, signed, to_uint8, viewing_scale
from dmd_jax.schedules import expand
from dmd_jax.sharding import check_batch_size, infer_shardings, place, replicated
from dmd_jax.train_step import EVERY_STEP, jit_step, make_train_step
from dmd_jax.weights import Weights, denoiser_of, params_sha256, save_weights

PREVIEW_COUNT = 10
# The rows of the preview, from the top.
PREVIEW_ROWS = ("x", "x_t", "denoised_real", "denoised_fake", "gradient", "x_ref", "y_ref")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "train")
    mesh = mesh_of(config)
    for name in ("batch_size", "regression_batch_size"):
        check_batch_size(
            config[name], mesh, accumulation=config.accumulation, name=f"config.{name}"
        )
    schedule = schedule_of(config)
    options = loss_options(config, schedule)
    teacher = teacher_of(config)
    denoiser = denoiser_of(teacher, dtype=config.compute_dtype)
    pairs = _open_pairs(config, denoiser, teacher)
    perceptual, perceptual_params = perceptual_of(config, denoiser.sample_shape)
    networks = one_architecture(denoiser.denoise, schedule)
    optimizer, fake_optimizer = (
        state.adamw(
            learning_rate=learning_rate,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            clip_norm=config.clip_norm,
        )
        for learning_rate in (config.learning_rate, config.fake_score_learning_rate)
    )
    teacher_shardings = infer_shardings(teacher.params, mesh)
    teacher_params = place(teacher.params, teacher_shardings)

    identity = {
        "teacher_sha256": pairs.metadata.teacher_sha256,
        "pairs_seed": pairs.metadata.seed,
        "pairs": len(pairs),
        "pairs_steps": pairs.metadata.num_steps,
    }
    if perceptual is not None:
        identity["lpips_sha256"] = params_sha256(perceptual_params)
    perceptual_shardings = jax.tree.map(lambda _: replicated(mesh), perceptual_params)
    perceptual_params = place(perceptual_params, perceptual_shardings)

    def initialize(params) -> state.TrainState:
        return state.train_state(
            params,
            params,
            optimizer=optimizer,
            fake_optimizer=fake_optimizer,
            use_ema=config.ema_decay > 0,
            seed=config.seed,
        )

    abstract = abstract_state(initialize, mesh, teacher_params)
    shardings = shardings_of(abstract)
    step = jit_step(
        make_train_step(
            networks,
            schedule=schedule,
            optimizer=optimizer,
            fake_optimizer=fake_optimizer,
            learning_rate=state.warmup(config.learning_rate, config.warmup_steps),
            batch_size=config.batch_size,
            sample_shape=denoiser.sample_shape,
            num_classes=denoiser.num_classes,
            min_index=config.min_index,
            max_index=config.max_index,
            fake_weight=fake_weight_of(config),
            generator_every=config.generator_every,
            accumulation=config.accumulation,
            ema_decay=config.ema_decay,
            perceptual=perceptual,
            mesh=mesh,
            loss_options=options,
        ),
        mesh,
        shardings,
        teacher_shardings,
        perceptual_shardings,
    )
    final = loop.run(
        name="train",
        workdir=args.workdir,
        config=config,
        identity=identity,
        abstract=abstract,
        initialize=functools.partial(jax.jit(initialize, out_shardings=shardings), teacher_params),
        advance=lambda train_state, batch: step(
            train_state, teacher_params, perceptual_params, batch
        ),
        batches=batches(
            pairs,
            batch_size=config.regression_batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        mesh=mesh,
        total_steps=config.steps,
        images_per_step=config.batch_size,
        sparse_every=config.generator_every,
        dense=EVERY_STEP,
        draw_pictures=_preview(
            config, options, networks, schedule, denoiser, pairs, teacher_params, mesh
        ),
    )
    trained = final.generator.params if final.ema is None else final.ema
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(trained)
    if jax.process_index() == 0:
        description = f"one-step generator, distilled for {int(final.step)} steps"
        weights = Weights(teacher.network, jax.device_get(params), description)
        save_weights(args.workdir / "weights", weights)


def _open_pairs(config, denoiser, teacher: Weights) -> PairSource:
    if not config.pairs.folder:
        raise UserError("config.pairs.folder is empty; expected the workdir of `dmd-jax pairs`")
    pairs = PairSource(
        config.pairs.folder,
        sample_shape=denoiser.sample_shape,
        num_classes=denoiser.num_classes,
    )
    if pairs.metadata.teacher_sha256 != params_sha256(teacher.params):
        raise UserError(
            f"pairs {config.pairs.folder} were made by another teacher "
            f"({pairs.metadata.teacher}) than config.teacher.weights {config.teacher.weights}"
        )
    return pairs


def _preview(config, options, networks, schedule, denoiser, pairs, teacher_params, mesh):
    """The images behind the loss, always of the same latents, levels and pairs."""
    records = [pairs[index] for index in range(min(PREVIEW_COUNT, len(pairs)))]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    cond = batch["label"] if denoiser.num_classes else None

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def images(generator_params, fake_score_params, teacher_params):
        key = state.role_key(state.key_data(config.seed), 0, state.Role.PREVIEW)
        latents_key, draw_key = jax.random.split(key)
        shape = batch["z_ref"].shape
        draws = draw(
            draw_key,
            shape,
            schedule=schedule,
            min_index=config.min_index,
            max_index=config.max_index,
        )
        _, aux = generator_loss(
            generator_params,
            draws,
            {
                "z": jax.random.normal(latents_key, shape),
                "cond": cond,
                "z_ref": jnp.asarray(batch["z_ref"]),
                "y_ref": jnp.asarray(batch["y_ref"]),
                "cond_ref": cond,
            },
            networks=networks,
            teacher_params=teacher_params,
            fake_score_params=fake_score_params,
            **options,
        )
        pictures = aux["pictures"]
        if "x_t" in pictures:
            # To the brightness of an image, whatever the noise's scale.
            spread = jnp.hypot(draws.level.alpha, draws.level.sigma)
            pictures["x_t"] = pictures["x_t"] / expand(spread, pictures["x_t"])
        return pictures

    def draw_pictures(train_state: state.TrainState) -> dict[str, np.ndarray]:
        trained = train_state.generator.params if train_state.ema is None else train_state.ema
        found = jax.device_get(images(trained, train_state.fake_score.params, teacher_params))
        rows = [
            signed(found[name]) if name == "gradient" else to_uint8(found[name])
            for name in PREVIEW_ROWS
            if name in found
        ]
        scale = viewing_scale(rows[0].shape[1])
        return {"preview": grid(np.concatenate(rows), columns=len(records), scale=scale)}

    return draw_pictures
