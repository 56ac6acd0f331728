"""What commands and configs ask of a family of teachers, without and with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dmd_jax.method import samplers
from dmd_jax.method.schedules import few_step_indices
from dmd_jax.models import Denoiser, abstract_params
from dmd_jax.storage.weights import Weights
from dmd_jax.teachers.teacher import Frozen, Sample, Teacher, Tokens
from dmd_jax.teachers.tokenizer import Tokenizer

# Options of networks, as for models.build_network, by the names of their parameters in Frozen;
# decoders are one deeper, by their own names.
Networks = Mapping[str, Any]


# The samplers of a generator, whatever its family.
GENERATORS = ("one-step", "few-step")


class Family(NamedTuple):
    """One family of networks; a teacher and the generators distilled from it are of one."""

    networks: tuple[str, ...]  # the names that config.network may have
    takes: str  # of its Teachers
    # In messages: "weights are ...", "the teacher is ...".
    weights_are: str
    network_is: str
    samplers: tuple[str, ...]
    pair_samplers: tuple[str, ...]  # of these, those of the noise-image pairs
    # Arguments of `sample` and `evaluate` that no other family has.
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any]  # of these and of "steps" and "batch_size"
    build: Callable[..., Teacher]  # (networks, dtype=, precision=, remat=)
    load: Callable[..., Pipeline]  # see load_pipeline


class Pipeline(NamedTuple):
    """A network with all that makes images of rows of data; parameters are on the host."""

    family: Family
    teacher: Teacher
    weights: Weights  # of the network itself
    frozen: Frozen  # without "null", which the text encoder makes
    identity: Callable[[], dict[str, Any]]  # JSON-able, what images depend on of the parameters
    # The following are of families that take text.
    tokenizer: Tokenizer | None = None
    tokens: Callable[[Sequence[str]], Tokens] | None = None  # of prompts
    sampling: Mapping[str, Any] | None = None


def generator_sampler(denoiser: Denoiser, num_steps: int, **options: float) -> Sample:
    """(frozen, z, cond, key) -> x0 of a generator's one step, or of its several.

    Args:
      options: of samplers.one_step, where num_steps is 1.

    Raises:
      UserError: num_steps does not divide the schedule's levels.
    """
    denoise, schedule = denoiser.denoise, denoiser.schedule
    few_step_indices(schedule.num_levels, num_steps)

    def sample(frozen: Frozen, z: jax.Array, cond: Any, key: jax.Array) -> jax.Array:
        given = denoise, frozen["network"], z, cond
        if num_steps == 1:
            return samplers.one_step(*given, schedule=schedule, **options)
        return samplers.few_step(*given, schedule=schedule, num_steps=num_steps, key=key)

    return sample


def abstract_frozen(networks: Networks) -> dict[str, Any]:
    """The shapes of the parameters that `build`'s teacher takes, "null" left out."""
    return {
        name: abstract_params(network) if "name" in network else abstract_frozen(network)
        for name, network in networks.items()
    }


def abstract_tokens(teacher: Teacher, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the tokens of some rows."""
    return {
        name: jax.ShapeDtypeStruct((rows, *one.shape), one.dtype)
        for name, one in teacher.tokens.items()
    }
