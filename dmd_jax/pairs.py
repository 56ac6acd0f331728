"""`dmd-jax pairs`: writes the noise-image pairs of the regression loss."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dmd_jax.arguments import add_run_arguments, run_config
from dmd_jax.config import save_config
from dmd_jax.data.loader import EpochOrder
from dmd_jax.data.pairs import write_pairs
from dmd_jax.data.pairs_metadata import PairsMetadata, TextPairsMetadata
from dmd_jax.data.prompts import PromptSource
from dmd_jax.errors import UserError
from dmd_jax.experiment import computation_of, prompts_of, teacher_of
from dmd_jax.generation import ImageMaker, draw_labels, draw_latents
from dmd_jax.metrics import Progress
from dmd_jax.models import complete
from dmd_jax.models.clip_text import check_tokens
from dmd_jax.parallel.processes import wait_for_all
from dmd_jax.state import Role
from dmd_jax.text_to_image import TEXT_SAMPLERS, LatentMaker, load_pipeline
from dmd_jax.tokenizer import Tokenizer
from dmd_jax.weights import Weights, denoiser_of, params_sha256
from dmd_jax.workdir_lock import locked

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = run_config(args, "pairs")
    options = config.pairs
    teacher = teacher_of(config)
    with_text = denoiser_of(teacher).cond_shape is not None
    plan = (_text_plan if with_text else _label_plan)(config, teacher)
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
        cond = plan.condition(start, stop)
        parts = []
        for part in plan.maker.batches(z_ref, cond):
            parts.append(part)
            progress.update(done + sum(map(len, parts)))
        name = plan.metadata.condition.name
        return {"z_ref": z_ref, "y_ref": np.concatenate(parts), name: cond}

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
    metadata: PairsMetadata | TextPairsMetadata
    maker: ImageMaker | LatentMaker
    condition: Callable[[int, int], np.ndarray]  # (start, stop) -> labels or tokens of these pairs
    warn: Callable[[], None] = lambda: None  # of what was found in them


def _label_plan(config: ConfigDict, teacher: Weights) -> _Plan:
    options = config.pairs
    _check_sampler(options.sampler, ("heun",), "is no text-to-image network")
    if config.guidance != 1:
        raise UserError(
            f"config.guidance is {config.guidance}; expected 1.0: the teacher is no text-to-image "
            "network"
        )
    maker = ImageMaker(
        teacher,
        sampler=options.sampler,
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        **computation_of(options),
    )
    metadata = PairsMetadata(
        sample_shape=maker.sample_shape,
        num_classes=maker.num_classes,
        **_shared(config, teacher),
    )
    return _Plan(
        metadata,
        maker,
        lambda start, stop: draw_labels(
            options.seed, start, stop, maker.num_classes, role=Role.PAIR_LABELS
        ),
    )


def _text_plan(config: ConfigDict, teacher: Weights) -> _Plan:
    options = config.pairs
    samplers = tuple(name for name in TEXT_SAMPLERS if name != "one-step")
    _check_sampler(options.sampler, samplers, "makes images of text")
    prompts = prompts_of(config)
    pipeline = load_pipeline(config.teacher.weights, unet=teacher)
    maker = LatentMaker(
        pipeline,
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance=config.guidance,
        batch_size=options.batch_size,
        **computation_of(options),
    )
    vocab_size = complete(pipeline.text_encoder.network)["vocab_size"]
    metadata = TextPairsMetadata(
        sample_shape=maker.latent_shape,
        num_classes=0,
        token_length=pipeline.tokenizer.max_length,
        vocab_size=vocab_size,
        text_encoder_sha256=params_sha256(pipeline.text_encoder.params),
        prompts=len(prompts),
        prompts_sha256=prompts.metadata.prompts_sha256,
        sampling=pipeline.sampling,
        **_shared(config, teacher),
    )
    tokens = _Tokens(prompts, pipeline.tokenizer, options.seed, vocab_size)
    return _Plan(metadata, maker, tokens, tokens.warn)


def _shared(config: ConfigDict, teacher: Weights) -> dict[str, Any]:
    """The fields of the metadata that are the same with labels and with text."""
    options = config.pairs
    return dict(
        teacher=teacher.description,
        teacher_sha256=params_sha256(teacher.params),
        sampler=options.sampler,
        num_steps=options.num_steps,
        guidance=config.guidance,
        seed=options.seed,
        count=options.count,
        shard_size=options.shard_size,
        compute_dtype=options.compute_dtype,
        matmul_precision=options.matmul_precision,
    )


def _check_sampler(name: str, known: tuple[str, ...], teacher: str) -> None:
    if name not in known:
        raise UserError(
            f"config.pairs.sampler is {name!r}; expected {' or '.join(known)}: the teacher "
            f"{teacher}"
        )


class _Tokens:
    """(start, stop) -> the tokens of these pairs' prompts, int32 [stop - start, L].

    Pair i's prompt is a function of (seed, i) and the number of prompts; each is used once before
    any is used again.
    """

    def __init__(self, prompts: PromptSource, tokenizer: Tokenizer, seed: int, vocab_size: int):
        self._prompts, self._tokenizer, self._vocab_size = prompts, tokenizer, vocab_size
        self._order = EpochOrder(len(prompts), seed)
        self._made = self._cut = 0

    def __call__(self, start: int, stop: int) -> np.ndarray:
        texts = [self._prompts[self._order(index)] for index in range(start, stop)]
        tokens = self._tokenizer.encode(texts)
        try:
            check_tokens(tokens, self._vocab_size)
        except UserError as error:
            raise UserError(f"prompts of pairs {start} to {stop - 1}: {error}") from error
        self._made += len(texts)
        self._cut += int(self._tokenizer.truncated(texts).sum())
        return tokens

    def warn(self) -> None:
        """Tells how many prompts were too long, if any."""
        if self._cut:
            log.warning(
                "%s of the prompts of %s pairs are longer than %d tokens and were cut there",
                *(f"{self._cut:,}", f"{self._made:,}", self._tokenizer.max_length),
            )
