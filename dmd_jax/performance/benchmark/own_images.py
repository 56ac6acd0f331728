"""Our side of making images: the generator from the host and back, on random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.distillation.from_config import computation_of
from dmd_jax.parallel.sharding import (
    batch_sharding,
    make_mesh,
    program_for,
    replicated,
    with_shardings,
)
from dmd_jax.performance.benchmark.own_step import delete, memory_facts
from dmd_jax.performance.benchmark.random_arrays import in_host_memory, random_weights
from dmd_jax.performance.flops import count_flops
from dmd_jax.sampling.maker import generator_maker
from dmd_jax.storage.weights import sampling_of
from dmd_jax.teachers.families import family_of, networks_of
from dmd_jax.teachers.family import abstract_frozen, abstract_tokens
from dmd_jax.teachers.teacher import Frozen, Teacher, Tokens


class OwnImages:
    """Latents and tokens, or labels, on the host to pixels on the host.

    It is the config's generator in its compute_dtype, of text with its encoder and a decoder.

    Args:
      count: images at a time.
      decoder: "taesd" or "vae" where images are made of text, else None.
      devices: that share the images.

    Attributes:
      images, flops: as of OwnStep.
      inputs: latents [N, ...] float32, and the tokens of these rows by name, in NumPy.
      params: from `prepare` on, what the generator's Teacher takes as Frozen.

    Raises:
      UserError: the config asks for something impossible.
    """

    def __init__(
        self, config: ConfigDict, *, count: int, decoder: str | None, devices: Sequence[jax.Device]
    ):
        mesh = make_mesh(devices=devices)
        whole, self._rows = replicated(mesh), batch_sharding(mesh)
        self.decoder = decoder
        networks = networks_of(config, decoder)
        teacher = family_of(config.network).build(networks, **computation_of(config))
        shapes = abstract_frozen(networks)
        self._shapes = with_shardings(shapes, jax.tree.map(lambda _: whole, shapes))
        rng = np.random.default_rng(0)
        self.inputs = (
            rng.standard_normal((count, *teacher.sample_shape), np.float32),
            {
                name: rng.integers(0, teacher.limits[name], one.shape, np.int32)
                for name, one in abstract_tokens(teacher, count).items()
            },
        )
        self._make = functools.partial(_pixels, teacher, sampling_of(config.objective), mesh)
        self.images, self.flops = count, count_flops(self._make, self._shapes, *self.inputs)

    def prepare(self) -> None:
        """Compiles the program, and makes the weights on the devices."""
        inputs = jax.tree.map(
            lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=self._rows),
            self.inputs,
        )
        lowered = jax.jit(self._make, out_shardings=self._rows).lower(self._shapes, *inputs)
        began = time.perf_counter()
        self._compiled = lowered.compile()
        self._compile_seconds = time.perf_counter() - began
        self.params = random_weights(self._shapes)

    def on_host(self) -> tuple[Any, Any]:
        """`params` once more, in NumPy, which takes none of the devices' memory, and `inputs`.

        Raises:
          UserError: see in_host_memory.
        """
        return jax.device_get(random_weights(in_host_memory(self._shapes))), self.inputs

    def __call__(self) -> np.ndarray:
        """Pixels, uint8 [N, H, W, C]."""
        rows = jax.device_put(self.inputs, self._rows)
        return np.asarray(self._compiled(self.params, *rows))

    def facts(self) -> dict[str, Any]:
        """As of OwnStep; there is no state."""
        return {"compile_seconds": self._compile_seconds} | memory_facts(self._compiled)

    def release(self) -> None:
        """Frees the devices' memory."""
        delete(self.params)


def _pixels(
    teacher: Teacher,
    generator: Mapping[str, float],
    mesh: Mesh,
    frozen: Frozen,
    z: jax.Array,
    tokens: Tokens,
) -> jax.Array:
    """uint8 images by EDM's rule (see pictures.to_uint8), so that little leaves the devices."""
    make = generator_maker(teacher, generator)
    with program_for(mesh):
        images = teacher.decode(frozen, make(frozen, z, tokens, jax.random.key(0)))
        return (127.5 * images + 128).clip(0, 255).astype(jnp.uint8)
