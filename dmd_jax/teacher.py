"""`dmd-jax teacher`: trains an EDM teacher on images."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from dmd_jax import loop, samplers, state
from dmd_jax.arguments import add_run_arguments, run_config
from dmd_jax.data.images import open_images
from dmd_jax.data.loader import batches
from dmd_jax.data.sources import ClassNames
from dmd_jax.errors import UserError
from dmd_jax.experiment import (
    abstract_state,
    computation_of,
    fake_weight_of,
    mesh_of,
    shardings_of,
)
from dmd_jax.introduction import introduce
from dmd_jax.models import build_denoiser
from dmd_jax.pictures import grid, to_uint8, viewing_scale
from dmd_jax.profiling import add_profile_argument, profiled_steps
from dmd_jax.sharding import check_batch_size, on_rows, own_rows, replicated
from dmd_jax.teacher_step import make_teacher_step, teacher_state
from dmd_jax.weights import CLASSES_FILE, Weights, save_class_names, save_from_devices
from dmd_jax.workdir_lock import locked

PREVIEW_COUNT = 40
NAMES_SHOWN = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_profile_argument(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "teacher")
    options = config.teacher
    profile = profiled_steps(args.profile, options.steps)
    mesh = mesh_of(config)
    introduce(mesh)
    check_batch_size(options.batch_size, mesh, name="config.teacher.batch_size")
    denoiser = build_denoiser(config.network.to_dict(), **computation_of(config))
    if denoiser.cond_shape is not None:
        raise UserError(
            f"config.network is {config.network.name}; expected a network of EDM's, which is what "
            "this command trains"
        )
    images = open_images(config.images, resolution=denoiser.sample_shape[0])
    if (images.sample_shape, images.num_classes) != (denoiser.sample_shape, denoiser.num_classes):
        raise UserError(
            f"config.images {config.images} has shape {images.sample_shape} and "
            f"{images.num_classes} classes; config.network expects {denoiser.sample_shape} and "
            f"{denoiser.num_classes}"
        )
    _announce(images.class_names, args.workdir)
    optimizer = state.adamw(
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        clip_norm=config.clip_norm,
    )

    def initialize() -> state.TeacherState:
        key = state.role_key(state.key_data(config.seed), 0, state.Role.INIT)
        return teacher_state(denoiser.init(key), optimizer=optimizer, seed=config.seed)

    abstract = abstract_state(initialize, mesh)
    shardings = shardings_of(abstract)
    step = make_teacher_step(
        denoiser.denoise,
        optimizer=optimizer,
        learning_rate=state.warmup(options.learning_rate, options.warmup_steps),
        conditional=denoiser.num_classes > 0,
        p_mean=options.p_mean,
        p_std=options.p_std,
        ema_decay=options.ema_decay,
        weight=fake_weight_of(config),
    )
    count = options.batch_size
    batch = {
        "x0": jax.ShapeDtypeStruct((count, *denoiser.sample_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    batch = on_rows(batch, mesh)
    with locked(args.workdir, first=jax.process_index() == 0):
        if jax.process_index() == 0:
            save_class_names(args.workdir, images.class_names)
        final = loop.run(
            name="teacher",
            workdir=args.workdir,
            config=config,
            identity={"images": len(images)},
            abstract=abstract,
            initialize=jax.jit(initialize, out_shardings=shardings),
            stages=[
                loop.Stage(
                    until=options.steps,
                    advance=jax.jit(
                        step,
                        in_shardings=(shardings, shardings_of(batch)),
                        out_shardings=(shardings, replicated(mesh)),
                        donate_argnums=0,
                    ),
                    batches=functools.partial(
                        batches,
                        images,
                        batch_size=options.batch_size,
                        seed=config.seed,
                        rows=own_rows(mesh, options.batch_size),
                    ),
                    batch=batch,
                    images_per_step=options.batch_size,
                )
            ],
            profile=profile,
            draw_pictures=_preview(config, denoiser, shardings.ema, mesh),
        )
        description = f"EDM teacher of {config.images}, EMA after {int(final.step)} steps"
        weights = Weights(
            config.network.to_dict(), final.ema, description, class_names=images.class_names
        )
        save_from_devices(args.workdir / "weights", weights)


def _announce(names: ClassNames, workdir: Path) -> None:
    """Prints which label each class has."""
    if names is None or jax.process_index() > 0:
        return
    shown = [f"{label} {name}" for label, name in enumerate(names) if name is not None]
    if len(shown) > NAMES_SHOWN:
        half = NAMES_SHOWN // 2
        shown[half:-half] = [f"… {len(shown) - 2 * half:,} more in {workdir / CLASSES_FILE} …"]
    print(f"teacher: classes by label: {', '.join(shown)}", flush=True)


def _preview(config, denoiser, shardings, mesh):
    """Samples of the average, always from the same latents."""

    @functools.partial(jax.jit, in_shardings=(shardings,), out_shardings=replicated(mesh))
    def sample(params):
        key = state.role_key(state.key_data(config.seed), 0, state.Role.PREVIEW)
        z = jax.random.normal(key, (PREVIEW_COUNT, *denoiser.sample_shape), jnp.float32)
        classes = denoiser.num_classes
        cond = jnp.arange(PREVIEW_COUNT) % classes if classes else None
        return samplers.heun(denoiser.denoise, params, z, cond, num_steps=config.pairs.num_steps)

    def draw(train_state: state.TeacherState):
        images = jax.device_get(sample(train_state.ema))
        scale = viewing_scale(images.shape[1])
        return {"samples": grid(to_uint8(images), columns=10, scale=scale)}

    return draw
