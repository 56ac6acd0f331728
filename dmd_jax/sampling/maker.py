"""Images from weights in any number: rows of latents and tokens in, batches over the devices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method.randomness import Role, key_data, role_key
from dmd_jax.sampling.devices import LocalDevices
from dmd_jax.teachers.family import GENERATORS, Pipeline
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens

log = logging.getLogger(__name__)

_FEW = 4  # steps of few-step with weights that say no number, as DMD2's generators have


class ImageMaker:
    """Makes images of noise and tokens on this process's devices, one compiled program for all.

    Args:
      sampler: one of the family's; None for the generator's, as its weights say.
      num_steps: of all but one-step; the weights' for few-step and the family's for the others by
        default.
      guidance: classifier-free, by the condition of nothing; 1 is none, and all that a generator
        takes.
      batch_size: images at a time, the family's by default; rounded up to a multiple of the
        devices.
      options: of the sampler, such as EDM's s_churn.
      sample_shape: of one x0, where it may differ from training; by default as in training.
      devices: all of this process's by default.

    Raises:
      UserError: an unknown sampler, or an impossible number of steps, guidance or option.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int | None = None,
        options: Mapping[str, float] | None = None,
        sample_shape: tuple[int, ...] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        teacher, defaults = pipeline.teacher, pipeline.family.defaults
        generator = pipeline.weights.generator
        sampler = sampler or generator_sampler_of(generator)
        options = _generator_options(sampler, generator) | dict(options or {})
        if num_steps is None:
            num_steps = steps_of(sampler, generator, defaults["steps"])
        make = x0_maker(teacher, sampler, num_steps=num_steps, guidance=guidance, **options)
        self.sample_shape = tuple(sample_shape or teacher.sample_shape)
        self._teacher = teacher
        self._devices = LocalDevices(batch_size or defaults["batch_size"], devices)
        self.batch_size = self._devices.batch_size
        # Where the sampler adds noise: that of a batch is one draw, and the devices may have made
        # the batch larger. None where images do not depend on their batch.
        adds_noise = sampler == "few-step" or options.get("s_churn")
        self.noise_batch_size = self.batch_size if adds_noise else None
        frozen = dict(pipeline.frozen)
        self._decoders = {"decoders": frozen.pop("decoders", {})}
        self._frozen = self._devices.replicate(frozen)
        if guidance != 1:
            nothing = self._devices.replicate(teacher.check(pipeline.tokens([""]), 1))
            self._frozen["null"] = jax.jit(teacher.encode)(self._frozen, nothing)
        self._make = self._devices.compile(make)

    @property
    def num_classes(self) -> int:
        """Of the labels that it takes; 0 for a network without classes."""
        return self._teacher.limits.get("label", 0)

    def __call__(
        self, z: np.ndarray, tokens: Mapping[str, np.ndarray], *, seed: int = 0, first: int = 0
    ) -> np.ndarray:
        """Images float32 [N, H, W, C], about in [-1, 1] and not clipped.

        Args:
          z: standard normal latents float [N, *sample_shape].
          tokens: of these rows, as the teacher's family has them.
          seed: of the noise that a stochastic sampler adds.
          first: the index of z[0] among the images of the seed; each batch's noise is a function
            of the seed and the index of the batch's first image.

        Raises:
          UserError: latents or tokens of another shape or type, or tokens that the network does
            not know.
        """
        return np.concatenate(list(self.batches(z, tokens, seed=seed, first=first)))

    def batches(
        self,
        z: np.ndarray,
        tokens: Mapping[str, np.ndarray],
        *,
        seed: int = 0,
        first: int = 0,
        decoded: bool = True,
    ) -> Iterator[np.ndarray]:
        """The images batch by batch, or the x0 [N, *sample_shape] that they are decoded from."""
        z = _checked_latents(z, self.sample_shape)
        rows = z, self._teacher.check(tokens, len(z))
        for start, count, batch in self._devices.batches(rows):
            key = role_key(key_data(seed), first + start, Role.SAMPLER_NOISE)
            x0 = self._make(self._frozen, *batch, key)
            yield np.asarray(self._decode(x0) if decoded else x0)[:count]

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Of one image, (H, W, C)."""
        return image_shape(self._teacher, self._decoders, self.sample_shape)

    @functools.cached_property
    def _decode(self) -> Callable[[jax.Array], jax.Array]:
        decode = self._devices.compile(self._teacher.decode)
        return functools.partial(decode, self._devices.replicate(self._decoders))


def generator_sampler_of(generator: Mapping[str, float]) -> str:
    """The sampler of a generator, by its Weights.generator."""
    return "few-step" if generator.get("num_steps", 1) > 1 else "one-step"


def steps_of(sampler: str, generator: Mapping[str, float], usual: int) -> int:
    """How many steps a sampler makes by default.

    Args:
      generator: Weights.generator. usual: of the family's samplers of several steps.
    """
    return int(generator.get("num_steps", _FEW)) if sampler == "few-step" else usual


def _generator_options(sampler: str, generator: Mapping[str, float]) -> dict[str, float]:
    """What a sampler is told of a generator, by its Weights.generator.

    Raises:
      UserError: a generator at a level of its own, with several steps.
    """
    if "sigma_init" not in generator or sampler not in GENERATORS:
        return {}
    sigma = generator["sigma_init"]
    if sampler != "one-step":
        raise UserError(
            f"{sampler} with a generator that is held at sigma = {sigma:g}; expected one-step"
        )
    return {"sigma": sigma}


def x0_maker(
    teacher: Teacher, sampler: str, *, num_steps: int, guidance: float = 1.0, **options: float
) -> Callable[[Frozen, jax.Array, Tokens, jax.Array], jax.Array]:
    """(frozen, z [B, *sample_shape], tokens, key) -> x0, by one of the teacher's samplers.

    Raises:
      UserError: an unknown sampler, or an impossible number of steps, guidance or option.
    """
    if sampler not in teacher.samplers:
        raise UserError(
            f"unknown sampler {sampler!r} of {teacher.takes}; expected one of "
            f"{', '.join(teacher.samplers)}"
        )
    sample = teacher.samplers[sampler](num_steps=num_steps, guidance=guidance, **options)
    return lambda frozen, z, tokens, key: sample(frozen, z, teacher.encode(frozen, tokens), key)


def generator_maker(
    teacher: Teacher, generator: Mapping[str, float]
) -> Callable[[Frozen, jax.Array, Tokens, jax.Array], jax.Array]:
    """`x0_maker` of a generator, by its Weights.generator."""
    sampler = generator_sampler_of(generator)
    options = _generator_options(sampler, generator)
    return x0_maker(teacher, sampler, num_steps=steps_of(sampler, generator, 1), **options)


def image_shape(teacher: Teacher, frozen: Frozen, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the image (H, W, C) that x0 of this shape is decoded to.

    Args:
      frozen: what `decode` takes, or its shapes.
    """
    x0 = jax.ShapeDtypeStruct((1, *sample_shape), jnp.float32)
    return jax.eval_shape(teacher.decode, frozen, x0).shape[1:]


def tokens_of(pipeline: Pipeline, prompts: Sequence[str]) -> Tokens:
    """The tokens of prompts, a row each; warns where some prompts are cut.

    Raises:
      UserError: a prompt that is no valid Unicode, or a token that the text encoder does not know.
    """
    cut = np.flatnonzero(pipeline.tokenizer.truncated(prompts))
    if len(cut):
        log.warning(
            "%d of %d prompts have more than %d tokens and are cut, the first is number %d",
            *(len(cut), len(prompts), pipeline.tokenizer.max_length, cut[0] + 1),
        )
    return pipeline.teacher.check(pipeline.tokens(prompts), len(prompts))


def _checked_latents(z: np.ndarray, sample_shape: tuple[int, ...]) -> np.ndarray:
    """z [N, *sample_shape] float, N >= 1, as an array.

    Raises:
      UserError: another shape or type.
    """
    z = np.asarray(z)
    if z.ndim == 0 or z.shape[1:] != tuple(sample_shape) or not len(z) or z.dtype.kind != "f":
        raise UserError(
            f"latents are {z.dtype} of shape {z.shape}; expected float [N, "
            f"{', '.join(map(str, sample_shape))}], N at least 1"
        )
    return z
