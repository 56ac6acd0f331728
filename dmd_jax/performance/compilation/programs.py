"""The programs of a config that can be compiled without weights and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import named_stages
from dmd_jax.distillation.from_config import check_batches, computation_of
from dmd_jax.distillation.program import abstract_program
from dmd_jax.parallel.sharding import (
    batch_sharding,
    bytes_a_device,
    make_mesh,
    replicated,
    with_shardings,
)
from dmd_jax.performance.flops import count_flops, model_flops
from dmd_jax.sampling.devices import LocalDevices
from dmd_jax.sampling.maker import generator_maker, generator_sampler_of, steps_of, x0_maker
from dmd_jax.storage.weights import sampling_of
from dmd_jax.teachers.families import family_of, networks_of
from dmd_jax.teachers.family import abstract_frozen, abstract_tokens

WHATS = ("train", "pairs", "sample")


class Compilable(NamedTuple):
    """A program that is not compiled yet."""

    lower: Callable[[], Any]  # -> jax.stages.Lowered
    flops: Callable[[], int]  # on all devices, without what is computed again for memory
    facts: dict[str, Any]  # JSON-able: "devices", "mesh", "images" and what else describes it
    params: Any  # of the network, as ShapeDtypeStructs with shardings


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
        "regression_images": stage.objective.get("regression_batch_size", 0),
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
        params=program.state.players[program.kept].params,
    )


def _sampling(config: ConfigDict, what: str, devices: Sequence[jax.Device]) -> Compilable:
    """`pairs` and `sample` run on each host's devices alone."""
    own = [device for device in devices if device.process_index == devices[0].process_index]
    options = config.pairs
    local = LocalDevices(options.batch_size, own)
    chosen = options if what == "pairs" else config
    computation = computation_of(chosen)
    generator, guidance = sampling_of(config.objective), 1.0
    sampler = generator_sampler_of(generator)
    steps = steps_of(sampler, generator, 1)
    if what == "pairs":
        sampler, steps, guidance = options.sampler, options.num_steps, config.teacher.guidance
    networks = networks_of(config)
    teacher = family_of(config.network).build(networks, **computation)
    if what == "pairs":
        make = x0_maker(teacher, sampler, num_steps=steps, guidance=guidance)
    else:
        make = generator_maker(teacher, generator)
    frozen = abstract_frozen(networks)
    if guidance != 1:
        frozen["null"] = jax.eval_shape(teacher.encode, frozen, abstract_tokens(teacher, 1))
    z = jax.ShapeDtypeStruct((local.batch_size, *teacher.sample_shape), jnp.float32)
    rows = z, abstract_tokens(teacher, local.batch_size)
    mesh = make_mesh(devices=own)
    placed = [
        with_shardings(frozen, jax.tree.map(lambda _: replicated(mesh), frozen)),
        *with_shardings(rows, jax.tree.map(lambda _: batch_sharding(mesh), rows)),
    ]

    def function(frozen: Any, z: jax.Array, tokens: Any) -> jax.Array:
        return make(frozen, z, tokens, jax.random.key(0))

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
        params=placed[0]["network"],
    )
