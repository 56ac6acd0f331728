"""Our side of making images: the one-step generator from the host and back, on random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax import samplers
from dmd_jax.benchmark.own_step import delete, memory_facts
from dmd_jax.benchmark.random_arrays import in_host_memory, random_weights
from dmd_jax.experiment import computation_of
from dmd_jax.flops import count_flops
from dmd_jax.models import abstract_params, build_denoiser, complete
from dmd_jax.sharding import (
    batch_sharding,
    make_mesh,
    program_for,
    replicated,
    with_shardings,
)
from dmd_jax.text_to_image import image_decoder, text_encoder


class OwnImages:
    """Latents and tokens, or labels, on the host to pixels on the host.

    It is the config's generator in its compute_dtype, of text with its encoder and a decoder.

    Args:
      count: images at a time.
      decoder: "taesd" or "vae" where images are made of text, else None.
      devices: that share the images.

    Attributes:
      images, flops: as of OwnStep.
      inputs: latents [N, ...] float32, and tokens [N, L] or labels [N] int32, in NumPy.
      params: from `prepare` on, {"network", and "text_encoder" and "decoder" where images are made
        of text}.

    Raises:
      UserError: the config asks for something impossible.
    """

    def __init__(
        self, config: ConfigDict, *, count: int, decoder: str | None, devices: Sequence[jax.Device]
    ):
        mesh = make_mesh(devices=devices)
        whole, self._rows = replicated(mesh), batch_sharding(mesh)
        generator = _text_generator(config, decoder) if decoder else _label_generator(config)
        shapes = {name: abstract_params(network) for name, network in generator.networks.items()}
        self._shapes = with_shardings(shapes, jax.tree.map(lambda _: whole, shapes))
        rng = np.random.default_rng(0)
        self.inputs = (
            rng.standard_normal((count, *generator.latent.shape), np.float32),
            rng.integers(0, generator.limit, (count, *generator.condition.shape), np.int32),
        )
        self._make = functools.partial(_pixels, generator.make, mesh)
        self.images, self.flops = count, count_flops(self._make, self._shapes, *self.inputs)

    def prepare(self) -> None:
        """Compiles the program, and makes the weights on the devices."""
        inputs = [
            jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=self._rows)
            for rows in self.inputs
        ]
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


class _Generator(NamedTuple):
    networks: dict[str, dict[str, Any]]
    latent: jax.ShapeDtypeStruct  # one
    condition: jax.ShapeDtypeStruct  # one, of integers
    limit: int  # that these are below
    make: Callable[[Any, jax.Array, jax.Array], jax.Array]  # -> images, about in [-1, 1]


def _pixels(
    make: Callable[..., jax.Array], mesh: Mesh, params: Any, z: jax.Array, cond: jax.Array
) -> jax.Array:
    """uint8 images by EDM's rule (see pictures.to_uint8), so that little leaves the devices."""
    with program_for(mesh):
        return (127.5 * make(params, z, cond) + 128).clip(0, 255).astype(jnp.uint8)


def _label_generator(config: ConfigDict) -> _Generator:
    networks = {"network": config.network.to_dict()}
    denoiser = build_denoiser(networks["network"], **computation_of(config))

    def make(params, z: jax.Array, labels: jax.Array) -> jax.Array:
        return samplers.one_step(
            denoiser.denoise, params["network"], z, labels, schedule=denoiser.schedule
        )

    latent = jax.ShapeDtypeStruct(denoiser.sample_shape, jnp.float32)
    label = jax.ShapeDtypeStruct((), jnp.int32)
    return _Generator(networks, latent, label, max(denoiser.num_classes, 1), make)


def _text_generator(config: ConfigDict, decoder: str) -> _Generator:
    networks = {
        "network": config.network.to_dict(),
        "text_encoder": config.text.text_encoder.to_dict(),
        "decoder": config.text[decoder].to_dict(),
    }
    denoiser = build_denoiser(networks["network"], **computation_of(config))
    encode = text_encoder(networks["text_encoder"], **computation_of(config))
    decode = image_decoder(networks["decoder"], **computation_of(config))

    def make(params, z: jax.Array, tokens: jax.Array) -> jax.Array:
        cond = encode(params["text_encoder"], tokens)
        latents = samplers.one_step(
            denoiser.denoise, params["network"], z, cond, schedule=denoiser.schedule
        )
        return decode(params["decoder"], latents)

    latent = jax.ShapeDtypeStruct(denoiser.sample_shape, jnp.float32)
    tokens = jax.ShapeDtypeStruct(denoiser.cond_shape[:1], jnp.int32)
    limit = complete(networks["text_encoder"])["vocab_size"]
    return _Generator(networks, latent, tokens, limit, make)
