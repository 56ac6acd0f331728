"""`dmd-jax pairs`: writes the noise-image pairs of the regression loss."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.commands.arguments import add_run_arguments, run_config
from dmd_jax.config import save_config
from dmd_jax.data.loader import EpochOrder
from dmd_jax.data.pair_shards import write_pairs
from dmd_jax.data.pairs_metadata import PairsMetadata, TextPairsMetadata
from dmd_jax.data.prompt_shards import PromptSource
from dmd_jax.distillation.from_config import computation_of, prompts_of, teacher_of
from dmd_jax.errors import UserError
from dmd_jax.method.randomness import Role
from dmd_jax.parallel.processes import wait_for_all
from dmd_jax.progress import Progress
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.sampling.maker import ImageMaker
from dmd_jax.storage.block_cache import add_cache_argument, limit_cache
from dmd_jax.storage.weights import params_sha256
from dmd_jax.storage.workdir_lock import locked
from dmd_jax.teachers.families import family_of, load_pipeline
from dmd_jax.teachers.family import Family, Pipeline
from dmd_jax.teachers.teacher import Tokens

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_cache_argument(parser)


def run(args: argparse.Namespace) -> None:
    limit_cache(args.cache_gb)
    config = run_config(args, "pairs")
    options = config.pairs
    plan = _plan(config)
    first = jax.process_index() == 0
    progress = None
    done = 0  # this process's pairs in finished shards

    def count(finished: int, total: int) -> None:
        nonlocal progress, done
        done = finished
        if progress is None:
            if first:  # not before the folder is ours: a refused config must not replace its own
                save_config(config, args.workdir, command="pairs")
            progress = Progress("pairs", total, start=finished, unit="pairs", enabled=first)

    def make_shard(start: int, stop: int) -> dict[str, np.ndarray]:
        shape = plan.metadata.sample_shape
        z_ref = draw_latents(options.seed, start, stop, shape, role=Role.PAIR_LATENTS)
        tokens = plan.tokens(start, stop)
        parts = []
        for part in plan.maker.batches(z_ref, tokens, decoded=False):
            parts.append(part)
            progress.update(done + sum(map(len, parts)))
        return {"z_ref": z_ref, "y_ref": np.concatenate(parts), **tokens}

    with locked(args.workdir, first=first):
        write_pairs(
            args.workdir,
            plan.metadata,
            make_shard,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            progress=count,
        )
        plan.warn()
        # What follows, training perhaps, needs the shards of all.
        wait_for_all()
    if first:
        print(f"pairs: {options.count:,} in {args.workdir}")


class _Plan(NamedTuple):
    metadata: PairsMetadata
    maker: ImageMaker
    tokens: Callable[[int, int], Tokens]  # (start, stop) -> of these pairs
    warn: Callable[[], None] = lambda: None  # of what was found in them


def _plan(config: ConfigDict) -> _Plan:
    options, teacher = config.pairs, teacher_of(config)
    family = family_of(teacher.network)
    _check_sampling(config, family)
    prompts = prompts_of(config) if family.takes == "text" else None
    pipeline = load_pipeline(config.teacher.weights, weights=teacher, **computation_of(options))
    maker = ImageMaker(
        pipeline,
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance=config.teacher.guidance,
        batch_size=options.batch_size,
    )
    shared = dict(
        teacher=teacher.description,
        teacher_sha256=params_sha256(teacher.params),
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance=config.teacher.guidance,
        seed=options.seed,
        count=options.count,
        shard_size=options.shard_size,
        compute_dtype=options.compute_dtype,
        matmul_precision=options.matmul_precision,
        sample_shape=maker.sample_shape,
        num_classes=maker.num_classes,
    )
    if prompts is None:
        metadata = PairsMetadata(**shared)
        return _Plan(metadata, maker, functools.partial(_labels, options.seed, maker.num_classes))
    metadata = TextPairsMetadata(
        token_length=pipeline.tokenizer.max_length,
        vocab_size=pipeline.teacher.limits["tokens"],
        text_encoder_sha256=params_sha256(pipeline.frozen["text_encoder"]),
        prompts=len(prompts),
        prompts_sha256=prompts.metadata.prompts_sha256,
        sampling=pipeline.sampling,
        **shared,
    )
    tokens = _PromptTokens(prompts, pipeline, options.seed)
    return _Plan(metadata, maker, tokens, tokens.warn)


def _check_sampling(config: ConfigDict, family: Family) -> None:
    name = config.pairs.sampler
    if name not in family.pair_samplers:
        raise UserError(
            f"config.pairs.sampler is {name!r}; expected {' or '.join(family.pair_samplers)}: the "
            f"teacher is {family.network_is}"
        )
    if config.teacher.guidance != 1 and "guidance" not in family.arguments:
        raise UserError(
            f"config.teacher.guidance is {config.teacher.guidance}; expected 1.0: the teacher is "
            f"{family.network_is}"
        )


def _labels(seed: int, num_classes: int, start: int, stop: int) -> Tokens:
    return {"label": draw_labels(seed, start, stop, num_classes, role=Role.PAIR_LABELS)}


class _PromptTokens:
    """(start, stop) -> the tokens of these pairs' prompts.

    Pair i's prompt is a function of (seed, i) and the number of prompts; each is used once before
    any is used again.
    """

    def __init__(self, prompts: PromptSource, pipeline: Pipeline, seed: int):
        self._prompts, self._pipeline = prompts, pipeline
        self._order = EpochOrder(len(prompts), seed)
        self._made = self._cut = 0

    def __call__(self, start: int, stop: int) -> Tokens:
        texts = [self._prompts[self._order(index)] for index in range(start, stop)]
        try:
            tokens = self._pipeline.teacher.check(self._pipeline.tokens(texts), len(texts))
        except UserError as error:
            raise UserError(f"prompts of pairs {start} to {stop - 1}: {error}") from error
        self._made += len(texts)
        self._cut += int(self._pipeline.tokenizer.truncated(texts).sum())
        return tokens

    def warn(self) -> None:
        """Tells how many prompts were too long, if any."""
        if self._cut:
            log.warning(
                "%s of the prompts of %s pairs are longer than %d tokens and were cut there",
                *(f"{self._cut:,}", f"{self._made:,}", self._pipeline.tokenizer.max_length),
            )
