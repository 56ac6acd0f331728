"""`dmd-jax pairs`: writes the noise-image pairs of the regression loss."""

from __future__ import annotations

import argparse

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax.arguments import add_run_arguments, end_on_sigterm, run_config
from dmd_jax.config import save_config
from dmd_jax.data.pairs import PairsMetadata, write_pairs
from dmd_jax.experiment import teacher_of
from dmd_jax.generation import ImageMaker, draw_labels, draw_latents
from dmd_jax.metrics import Progress
from dmd_jax.weights import params_sha256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "pairs")
    end_on_sigterm()
    options = config.pairs
    teacher = teacher_of(config)
    maker = ImageMaker(
        teacher,
        sampler="heun",
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        dtype=options.compute_dtype,
    )
    metadata = PairsMetadata(
        teacher=teacher.description,
        teacher_sha256=params_sha256(teacher.params),
        sampler="heun",
        num_steps=options.num_steps,
        guidance=1.0,
        seed=options.seed,
        count=options.count,
        shard_size=options.shard_size,
        sample_shape=maker.sample_shape,
        num_classes=maker.num_classes,
    )
    first = jax.process_index() == 0
    if first:
        save_config(config, args.workdir, command="pairs")
    progress = None
    done = 0  # this process's pairs in finished shards

    def count(finished: int, total: int) -> None:
        nonlocal progress, done
        done = finished
        if progress is None:
            progress = Progress("pairs", total, start=finished, unit="pairs", enabled=first)

    def make_shard(start: int, stop: int) -> dict[str, np.ndarray]:
        z_ref = draw_latents(options.seed, start, stop, maker.sample_shape)
        label = draw_labels(options.seed, start, stop, maker.num_classes)
        parts = []
        for part in maker.batches(z_ref, label):
            parts.append(part)
            progress.update(done + sum(map(len, parts)))
        return {"z_ref": z_ref, "y_ref": np.concatenate(parts), "label": label}

    write_pairs(
        args.workdir,
        metadata,
        make_shard,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        progress=count,
    )
    # What follows, training perhaps, needs the shards of all.
    multihost_utils.sync_global_devices("pairs")
    if first:
        print(f"pairs: {options.count:,} in {args.workdir}")
