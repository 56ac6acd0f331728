"""`dmd-jax train`: distils the teacher into a one-step generator."""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import loop, state
from dmd_jax.arguments import add_run_arguments, run_config
from dmd_jax.config import stages_of
from dmd_jax.distillation import initial_state, optimizers_of, setting_of, train_step_of
from dmd_jax.distillation.setting import Setting
from dmd_jax.errors import UserError
from dmd_jax.experiment import (
    abstract_state,
    loss_options,
    mesh_of,
    shardings_of,
    teacher_of,
)
from dmd_jax.objective import draw, generator_loss
from dmd_jax.pictures import grid, signed, to_uint8, viewing_scale
from dmd_jax.schedules import expand
from dmd_jax.sharding import (
    batch_sharding,
    check_batch_size,
    infer_shardings,
    place,
    replicated,
)
from dmd_jax.train_step import EVERY_STEP, jit_step
from dmd_jax.weights import Weights, save_weights

PREVIEW_COUNT = 10
# The rows of the preview, from the top.
PREVIEW_ROWS = ("x", "x_t", "denoised_real", "denoised_fake", "gradient", "x_ref", "y_ref")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "train")
    mesh = mesh_of(config)
    parts = stages_of(config)
    for _, part in parts:
        _check_batches(part, mesh)
    teacher = teacher_of(config)
    setting = setting_of(config, teacher)
    method = setting.method
    for _, part in parts:
        loss_options(part, method.schedule)
    optimizers = optimizers_of(config)
    teacher_shardings = infer_shardings(setting.arguments.teacher, mesh)
    teacher_params = place(setting.arguments.teacher, teacher_shardings)
    perceptual_shardings = jax.tree.map(lambda _: replicated(mesh), setting.arguments.perceptual)
    perceptual_params = place(setting.arguments.perceptual, perceptual_shardings)
    initialize = functools.partial(initial_state, config, method, optimizers)
    abstract = abstract_state(initialize, mesh, teacher_params)
    shardings = shardings_of(abstract)
    encode_ahead = _ahead(setting, mesh)

    def stage(until: int, part: ConfigDict) -> loop.Stage:
        step = jit_step(
            train_step_of(part, method, optimizers, mesh),
            mesh,
            shardings,
            teacher_shardings,
            perceptual_shardings,
        )
        return loop.Stage(
            until=until,
            advance=lambda train_state, batch: step(
                train_state, teacher_params, perceptual_params, encode_ahead(batch)
            ),
            batches=functools.partial(setting.data, part),
            images_per_step=part.batch_size,
        )

    final = loop.run(
        name="train",
        workdir=args.workdir,
        config=config,
        identity=setting.identity,
        abstract=abstract,
        initialize=functools.partial(jax.jit(initialize, out_shardings=shardings), teacher_params),
        stages=[stage(*part) for part in parts],
        mesh=mesh,
        sparse_every=config.generator_every,
        dense=EVERY_STEP,
        draw_pictures=_preview(config, setting, teacher_params, perceptual_params, mesh),
    )
    trained = final.generator.params if final.ema is None else final.ema
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(trained)
    if jax.process_index() == 0:
        description = f"one-step generator, distilled for {int(final.step)} steps"
        weights = Weights(teacher.network, jax.device_get(params), description)
        save_weights(args.workdir / "weights", weights)


def _check_batches(config: ConfigDict, mesh: Mesh) -> None:
    for name in ("batch_size", "regression_batch_size"):
        check_batch_size(
            config[name], mesh, accumulation=config.accumulation, name=f"config.{name}"
        )
    if config.match_reference and config.batch_size <= config.regression_batch_size:
        raise UserError(
            f"config.batch_size is {config.batch_size}; expected more than "
            f"regression_batch_size={config.regression_batch_size}, whose latents are among it "
            "with config.match_reference"
        )


def _ahead(setting: Setting, mesh: Mesh):
    """batch -> batch with the text encoded, where that is a program of its own."""
    if setting.method.ahead is None:
        return lambda batch: batch
    params = setting.arguments.ahead
    shardings = infer_shardings(params, mesh)
    jitted = jax.jit(
        setting.method.ahead,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh),
    )
    return functools.partial(jitted, place(params, shardings))


def _preview(config: ConfigDict, setting: Setting, teacher_params, perceptual_params, mesh: Mesh):
    """The images behind the loss, always of the same latents, levels and pairs."""
    pairs, method = setting.pairs, setting.method
    records = [pairs[index] for index in range(min(PREVIEW_COUNT, len(pairs)))]
    batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
    cond = setting.show_condition(batch)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def images(generator_params, fake_score_params, teacher_params, perceptual_params, batch, cond):
        key = state.role_key(state.key_data(config.seed), 0, state.Role.PREVIEW)
        latents_key, draw_key = jax.random.split(key)
        shape = batch["z_ref"].shape
        draws = draw(
            draw_key,
            shape,
            schedule=method.schedule,
            min_index=config.min_index,
            max_index=config.max_index,
        )
        _, aux = generator_loss(
            generator_params,
            draws,
            {
                "z": jax.random.normal(latents_key, shape),
                "cond": cond,
                "z_ref": batch["z_ref"],
                "y_ref": batch["y_ref"],
                "cond_ref": cond,
            },
            networks=method.networks,
            teacher_params=teacher_params,
            fake_score_params=fake_score_params,
            **loss_options(config, method.schedule),
        )
        pictures = aux["pictures"]
        if "x_t" in pictures:
            # To the brightness of an image, whatever the noise's scale.
            spread = jnp.hypot(draws.level.alpha, draws.level.sigma)
            pictures["x_t"] = pictures["x_t"] / expand(spread, pictures["x_t"])
        shown = {
            name: method.show(perceptual_params, picture)
            for name, picture in pictures.items()
            if name in PREVIEW_ROWS and name != "gradient"
        }
        if "gradient" in pictures:
            shown["gradient"] = _beside(pictures["gradient"], shown["x"])
        return shown

    def draw_pictures(train_state: state.TrainState) -> dict[str, np.ndarray]:
        trained = train_state.generator.params if train_state.ema is None else train_state.ema
        found = jax.device_get(
            images(
                trained,
                train_state.fake_score.params,
                teacher_params,
                perceptual_params,
                batch,
                cond,
            )
        )
        rows = [
            signed(found[name]) if name == "gradient" else to_uint8(found[name])
            for name in PREVIEW_ROWS
            if name in found
        ]
        scale = viewing_scale(rows[0].shape[1])
        return {"preview": grid(np.concatenate(rows), columns=len(records), scale=scale)}

    return draw_pictures


def _beside(gradient: jax.Array, images: jax.Array) -> jax.Array:
    """A gradient on latents at the size and with the channels of their images."""
    factor = images.shape[1] // gradient.shape[1]
    gradient = jnp.repeat(jnp.repeat(gradient, factor, axis=1), factor, axis=2)
    return gradient[..., : images.shape[-1]]
