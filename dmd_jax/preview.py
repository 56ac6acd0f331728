"""The pictures of a distillation: what each part of the loss sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.distillation.setting import Setting
from dmd_jax.experiment import loss_options
from dmd_jax.objective import draw, generator_loss
from dmd_jax.pictures import grid, signed, to_uint8, viewing_scale
from dmd_jax.schedules import expand
from dmd_jax.sharding import replicated
from dmd_jax.state import Role, TrainState, key_data, role_key

# Columns: for images up to 64 pixels, and for larger ones.
COUNT, LARGE_COUNT = 10, 4
# From the top.
ROWS = ("x", "x_t", "denoised_real", "denoised_fake", "gradient", "x_ref", "y_ref")


def preview(
    config: ConfigDict, setting: Setting, teacher_params: Any, perceptual_params: Any, mesh: Mesh
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """Pictures of the images behind the loss, always of the same latents, levels and pairs.

    Args:
      teacher_params, perceptual_params: the step's arguments, on the mesh.

    Returns:
      state -> {"preview": uint8 [H, W, C]}, of the average where the state has one; nothing
      on processes but the first.
    """
    pairs, method = setting.pairs, setting.method
    latents = jax.ShapeDtypeStruct((1, *method.sample_shape), jnp.float32)
    size = jax.eval_shape(method.show, perceptual_params, latents).shape[1]
    count = COUNT if size <= 64 else LARGE_COUNT
    records = [pairs[index] for index in range(min(count, len(pairs)))]
    rows = {name: np.stack([record[name] for record in records]) for name in records[0]}
    cond = setting.show_condition(rows)
    batch = {
        "z_ref": rows["z_ref"],
        "y_ref": rows["y_ref"],
        "cond": cond,
        "cond_ref": cond,
    }

    def of_one(generator_params, fake_score_params, teacher_params, perceptual_params, example):
        # One at a time: attention on large latents needs gigabytes for a few of them.
        batch, draws = jax.tree.map(lambda leaf: leaf[None], example)
        _, aux = generator_loss(
            generator_params,
            draws,
            batch,
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
            if name in ROWS and name != "gradient"
        }
        if "gradient" in pictures:
            shown["gradient"] = _beside(pictures["gradient"], shown["x"])
        return jax.tree.map(lambda leaf: leaf[0], shown)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def images(generator_params, fake_score_params, teacher_params, perceptual_params, batch):
        key = role_key(key_data(config.seed), 0, Role.PREVIEW)
        latents_key, draw_key = jax.random.split(key)
        shape = batch["z_ref"].shape
        draws = draw(
            draw_key,
            shape,
            schedule=method.schedule,
            min_index=config.min_index,
            max_index=config.max_index,
        )
        batch = batch | {"z": jax.random.normal(latents_key, shape, jnp.float32)}
        params = generator_params, fake_score_params, teacher_params, perceptual_params
        return jax.lax.map(lambda example: of_one(*params, example), (batch, draws))

    def draw_pictures(state: TrainState) -> dict[str, np.ndarray]:
        trained = state.generator.params if state.ema is None else state.ema
        found = images(trained, state.fake_score.params, teacher_params, perceptual_params, batch)
        if jax.process_index():
            return {}
        found = jax.device_get(found)
        shown = [
            signed(found[name]) if name == "gradient" else to_uint8(found[name])
            for name in ROWS
            if name in found
        ]
        scale = viewing_scale(shown[0].shape[1])
        return {"preview": grid(np.concatenate(shown), columns=len(records), scale=scale)}

    return draw_pictures


def _beside(gradient: jax.Array, images: jax.Array) -> jax.Array:
    """A gradient on latents at the size and with the channels of their images."""
    factor = images.shape[1] // gradient.shape[1]
    gradient = jnp.repeat(jnp.repeat(gradient, factor, axis=1), factor, axis=2)
    return gradient[..., : images.shape[-1]]
