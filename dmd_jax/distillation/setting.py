"""What a distillation works with: the three roles, their data, and how its samples are seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.data.loader import batches
from dmd_jax.data.pairs import PairSource
from dmd_jax.data.pairs_metadata import TextPairsMetadata
from dmd_jax.errors import UserError
from dmd_jax.objective import Networks
from dmd_jax.schedules import NoiseSchedule
from dmd_jax.sharding import own_rows
from dmd_jax.train_step import Batch
from dmd_jax.types import Params
from dmd_jax.weights import Weights, params_sha256

Distance = Callable[[Any, jax.Array, jax.Array], jax.Array]
# The stages before one: how many steps each had, and its config.
Earlier = Sequence[tuple[int, ConfigDict]]


class Arguments(NamedTuple):
    """What a step takes beside the state and the batch: host arrays, or ShapeDtypeStructs."""

    teacher: Any  # the step's second argument
    perceptual: Any  # its third
    ahead: Params | None  # of Method.ahead


class Method(NamedTuple):
    """The functions of a distillation, be its condition a label or a text."""

    networks: Networks
    schedule: NoiseSchedule
    sample_shape: tuple[int, ...]
    num_classes: int
    network_params: Callable[[Any], Params]  # the network's own among the teacher's
    condition: Callable[[Any, Batch], tuple[Any, Any]] | None  # of make_train_step
    # What each batch goes through before the step: (params, batch) -> batch.
    ahead: Callable[[Params, Batch], Batch] | None
    # A stage's config -> the regression's distance, a function of perceptual; None is L2.
    distance: Callable[[ConfigDict], Distance | None]
    # (perceptual, samples) -> images [N, H, W, C] to look at
    show: Callable[[Any, jax.Array], jax.Array]
    # As ShapeDtypeStructs; a full-size network takes seconds to trace, and training needs none.
    arguments: Callable[[], Arguments]
    # A stage's config -> the whole batch that `ahead` and the step take, as ShapeDtypeStructs.
    batch: Callable[[ConfigDict], Batch]


class Setting(NamedTuple):
    """A distillation with its weights and its data."""

    method: Method
    arguments: Arguments  # host arrays
    pairs: PairSource
    show_condition: Callable[[Batch], Any]  # that of pairs, for pictures
    # The mesh, a stage's config and the stages before it -> this process's endless batches.
    data: Callable[[Mesh, ConfigDict, Earlier], Iterator[Batch]]
    identity: dict[str, Any]  # what a resumed run must share


def open_pairs(config: ConfigDict, teacher: Weights, **expected: Any) -> PairSource:
    """The pairs of config.pairs.folder, which are the teacher's.

    Args:
      expected: of PairSource.

    Raises:
      UserError: they are not there, not whole, of another kind or of another teacher.
    """
    if not config.pairs.folder:
        raise UserError("config.pairs.folder is empty; expected the workdir of `dmd-jax pairs`")
    pairs = PairSource(config.pairs.folder, **expected)
    if pairs.metadata.teacher_sha256 != params_sha256(teacher.params):
        raise UserError(
            f"pairs {config.pairs.folder} were made by another teacher "
            f"({pairs.metadata.teacher}) than config.teacher.weights {config.teacher.weights}"
        )
    return pairs


def own_batches(
    source, size: Callable[[ConfigDict], int], mesh: Mesh, config: ConfigDict, earlier: Earlier
) -> Iterator[Batch]:
    """This process's rows of endless batches, from where the stages before have come to.

    Args:
      size: a stage's config -> the rows of its global batch.
    """
    return batches(
        source,
        batch_size=size(config),
        seed=config.seed,
        start=sum(steps * size(stage) for steps, stage in earlier),
        rows=own_rows(mesh, size(config)),
    )


def identity_of(pairs: PairSource, lpips_params: Params | None) -> dict[str, Any]:
    """What identifies the regression in a checkpoint."""
    identity = {
        "teacher_sha256": pairs.metadata.teacher_sha256,
        "pairs_seed": pairs.metadata.seed,
        "pairs": len(pairs),
        "pairs_steps": pairs.metadata.num_steps,
        "pairs_sampler": pairs.metadata.sampler,
    }
    if isinstance(pairs.metadata, TextPairsMetadata):
        identity["pairs_prompts_sha256"] = pairs.metadata.prompts_sha256
    if lpips_params is not None:
        identity["lpips_sha256"] = params_sha256(lpips_params)
    return identity
