"""The programs of a config that can be compiled without weights and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import named_stages
from dmd_jax.distillation.program import abstract_program, model_flops
from dmd_jax.experiment import check_batches, computation_of
from dmd_jax.flops import count_flops
from dmd_jax.generation import LocalDevices, image_sampler
from dmd_jax.models import Denoiser, abstract_params, build_denoiser
from dmd_jax.sharding import (
    batch_sharding,
    bytes_a_device,
    make_mesh,
    replicated,
    with_shardings,
)
from dmd_jax.text_to_image import latent_sampler, text_encoder

# As Stable Diffusion's folders have it.
_SAMPLING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
WHATS = ("train", "pairs", "sample")


class Compilable(NamedTuple):
    """A program that is not compiled yet."""

    lower: Callable[[], Any]  # -> jax.stages.Lowered
    flops: Callable[[], int]  # on all devices, without what is computed again for memory
    facts: dict[str, Any]  # JSON-able: "devices", "mesh", "images" and what else describes it


def compilable(config: ConfigDict, what: str, devices: Sequence[jax.Device]) -> Compilable:
    """What `dmd-jax train`, `pairs` or `sample` would run on these devices.

    Raises:
      UserError: the config asks for something impossible.
    """
    if what == "train":
        return _training(config, make_mesh(**config.mesh.to_dict(), devices=devices))
    return _sampling(config, what, devices)


def _training(config: ConfigDict, mesh: Mesh) -> Compilable:
    for where, stage in named_stages(config):
        check_batches(stage, mesh, where)
    program = abstract_program(config, mesh)
    facts = {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "images": stage.batch_size,
        "regression_images": stage.regression_batch_size,
        "accumulation": stage.accumulation,
        "remat": stage.remat,
        "compute_dtype": stage.compute_dtype,
        "matmul_precision": stage.matmul_precision,
        "state_bytes": bytes_a_device(program.state),
    }
    return Compilable(
        lower=lambda: program.step(stage).lower(*program.arguments(stage)),
        flops=lambda: model_flops(stage),
        facts=facts,
    )


def _sampling(config: ConfigDict, what: str, devices: Sequence[jax.Device]) -> Compilable:
    """`pairs` and `sample` run on each host's devices alone."""
    own = [device for device in devices if device.process_index == devices[0].process_index]
    options = config.pairs
    local = LocalDevices(options.batch_size, own)
    chosen = options if what == "pairs" else config
    computation = computation_of(chosen)
    denoiser = build_denoiser(config.network.to_dict(), **computation)
    sampler, steps = (options.sampler, options.num_steps) if what == "pairs" else ("one-step", 1)
    make = _of_labels if denoiser.cond_shape is None else _of_text
    guidance = config.guidance if what == "pairs" else 1.0
    function, inputs = make(
        config, denoiser, sampler, steps, guidance=guidance, computation=computation
    )
    mesh = make_mesh(devices=own)
    params, *rows = inputs
    placed = [with_shardings(params, jax.tree.map(lambda _: replicated(mesh), params))]
    for row in rows:
        shape = (local.batch_size, *row.shape)
        placed.append(jax.ShapeDtypeStruct(shape, row.dtype, sharding=batch_sharding(mesh)))
    jitted = local.compile(function)
    facts = {
        "devices": len(own),
        "mesh": dict(mesh.shape),
        "images": local.batch_size,
        "sampler": sampler,
        "sampling_steps": steps,
        "compute_dtype": chosen.compute_dtype,
        "matmul_precision": chosen.matmul_precision,
    }
    return Compilable(
        lower=lambda: jitted.lower(*placed),
        flops=lambda: count_flops(function, *placed),
        facts=facts,
    )


def _of_labels(config: ConfigDict, denoiser: Denoiser, sampler: str, steps: int, **_: Any):
    """(params, z, labels) -> images, and what it takes: one row of each but the parameters."""
    sample = image_sampler(sampler, denoiser, steps, {})
    inputs = [
        abstract_params(config.network.to_dict()),
        jax.ShapeDtypeStruct(denoiser.sample_shape, jnp.float32),
    ]
    if not denoiser.num_classes:
        return lambda params, z: sample(params, z, None, jax.random.key(0)), inputs
    inputs.append(jax.ShapeDtypeStruct((), jnp.int32))
    return lambda params, z, labels: sample(params, z, labels, jax.random.key(0)), inputs


def _of_text(
    config: ConfigDict,
    denoiser: Denoiser,
    sampler: str,
    steps: int,
    *,
    guidance: float,
    computation: dict[str, str],
):
    """(params, z, tokens) -> latents, likewise."""
    encoder = config.text.text_encoder.to_dict()
    sample = latent_sampler(sampler, denoiser, steps, guidance, _SAMPLING)
    encode = text_encoder(encoder, **computation)

    def make(params: Any, z: jax.Array, tokens: jax.Array) -> jax.Array:
        cond = encode(params["text_encoder"], tokens)
        return sample(params["network"], z, cond, params["uncond"])

    params = {
        "network": abstract_params(config.network.to_dict()),
        "text_encoder": abstract_params(encoder),
        "uncond": jax.ShapeDtypeStruct((1, *denoiser.cond_shape), jnp.float32),
    }
    z = jax.ShapeDtypeStruct(denoiser.sample_shape, jnp.float32)
    return make, [params, z, jax.ShapeDtypeStruct(denoiser.cond_shape[:1], jnp.int32)]
