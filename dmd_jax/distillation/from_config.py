"""What a config says, as the objects that the commands work with."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import stages_of, value_of
from dmd_jax.data.images import open_images
from dmd_jax.data.prompt_shards import PromptSource
from dmd_jax.data.sources import ImageSource
from dmd_jax.errors import UserError
from dmd_jax.method import losses
from dmd_jax.method.schedules import NoiseLevel
from dmd_jax.method.types import Params
from dmd_jax.models import complete
from dmd_jax.models.judges.lpips import lpips, lpips_template
from dmd_jax.parallel.sharding import check_batch_size, infer_shardings, make_mesh, with_shardings
from dmd_jax.storage.files import path_of
from dmd_jax.storage.judge_weights import LPIPS, how_to_make, load_auxiliary
from dmd_jax.storage.weights import Weights, load_weights
from dmd_jax.teachers.teacher import Teacher


def check_batches(config: ConfigDict, mesh: Mesh, where: str) -> None:
    """Raises a UserError unless the devices can share the batches of the config, or of a stage.

    Args:
      where: the config's name in the message.
    """
    # The pairs' rows are few beside what the networks see: where fsdp does not divide them, some
    # devices have one more than others.
    sizes = {"batch_size": ("data", "fsdp")}
    if "regression_batch_size" in config.objective:
        sizes["objective.regression_batch_size"] = ("data",)
    for key, axes in sizes.items():
        check_batch_size(
            value_of(config, key),
            mesh,
            accumulation=config.accumulation,
            name=f"{where}.{key}",
            axes=axes,
        )
    pairs = config.objective.get("regression_batch_size", 0)
    if config.objective.get("match_reference") and config.batch_size <= pairs:
        raise UserError(
            f"{where}.batch_size is {config.batch_size}; expected more than "
            f"objective.regression_batch_size={pairs}, whose latents are among it with "
            "config.objective.match_reference"
        )


def fake_weight_of(config: ConfigDict) -> Callable[[NoiseLevel], jax.Array]:
    """The weight of the denoising loss: EDM's at the network's sigma_data, else the noise's MSE."""
    sigma_data = complete(config.network.to_dict()).get("sigma_data")
    if sigma_data is None:
        return losses.snr_weight
    return functools.partial(losses.edm_weight, sigma_data=sigma_data)


def mesh_of(config: ConfigDict) -> Mesh:
    """All devices of all processes in the config's mesh."""
    return make_mesh(config.mesh.data, config.mesh.fsdp)


def teacher_of(config: ConfigDict) -> Weights:
    """The teacher's weights.

    Raises:
      UserError: none are named or readable, or they are of another network than the config's.
    """
    if not config.teacher.weights:
        raise UserError(
            "config.teacher.weights is empty; expected a weights folder or the workdir of "
            "`dmd-jax teacher`"
        )
    weights = load_weights(config.teacher.weights)
    check_same_network(weights.network, config.network.to_dict(), config.teacher.weights)
    return weights


def check_same_network(
    found: dict[str, Any], expected: dict[str, Any], where: Any, *, key: str = "network"
) -> None:
    """Raises a UserError that names the options in which two networks compute otherwise.

    `expected` is that of the config's `key`.

    Those of the teacher's own training are none of them: dropout and augmentation are off here.
    """
    found, expected = _jsonable(complete(found)), _jsonable(complete(expected))
    names = sorted((found.keys() | expected.keys()) - {"dropout", "augment_dim"})
    different = [
        f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
    if different:
        raise UserError(
            f"{where} is of another architecture than config.{key}: {'; '.join(different)}"
        )


def images_of(config: ConfigDict, teacher: Teacher) -> ImageSource:
    """The real images of config.data.images.

    Raises:
      UserError: none are named or readable, or they do not fit the network.
    """
    if not config.data.images:
        raise UserError(
            "config.data.images is empty; expected real images, such as a folder or .zip of them"
        )
    classes = teacher.limits.get("label", 0)
    images = open_images(config.data.images, resolution=teacher.sample_shape[0])
    # A network without classes takes images with labels, which it is not told.
    if images.sample_shape != teacher.sample_shape or (classes and images.num_classes != classes):
        raise UserError(
            f"config.data.images {config.data.images} has shape {images.sample_shape} and "
            f"{images.num_classes} classes; config.network expects {teacher.sample_shape} and "
            f"{classes}"
        )
    return images


def computation_of(config: ConfigDict) -> dict[str, str]:
    """In what networks compute, as keywords of their builders: "dtype" and "precision".

    Args:
      config: of a run, or its part `pairs`.
    """
    return {"dtype": config.compute_dtype, "precision": config.matmul_precision}


def distance_of(
    config: ConfigDict, image_shape: tuple[int, ...]
) -> Callable[[Params, jax.Array, jax.Array], jax.Array] | None:
    """The objective's distance (LPIPS's params, x, y) -> [B] of images; None for any but LPIPS.

    Raises:
      UserError: images that LPIPS cannot see.
    """
    # Objectives other than DMD have a distance for no regression.
    asked = any(stage.objective.get("regression_weight", 1) for _, stage in stages_of(config))
    if config.objective.get("distance") != "lpips" or not asked:
        return None
    options = config.lpips
    grey = image_shape[-1] == 1
    if grey and not options.repeat_grey:
        raise UserError(
            "LPIPS takes three channels and these images are grey; expected "
            "config.lpips.repeat_grey=True, which shows it three times, or "
            "config.objective.distance=l2"
        )

    def distance(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        if grey:
            x, y = (jnp.repeat(image, 3, axis=-1) for image in (x, y))
        return lpips(
            params,
            x,
            y,
            pooling=options.pooling,
            resolution=options.resolution or None,
            **computation_of(config),
        )

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(distance, lpips_template(), image, image)
    except UserError as error:
        raise UserError(f"config.lpips: {error}") from error
    return distance


def prompts_of(config: ConfigDict) -> PromptSource:
    """The prompts of config.data.prompts.

    Raises:
      UserError: none are named, or they are not whole.
    """
    if not config.data.prompts:
        raise UserError("config.data.prompts is empty; expected the folder of `dmd-jax prompts`")
    return PromptSource(config.data.prompts)


def lpips_of(config: ConfigDict) -> Params:
    """LPIPS's parameters.

    Raises:
      UserError: none are named, or they are not LPIPS's.
    """
    if not config.lpips.weights:
        raise UserError(
            f"config.lpips.weights is empty; {how_to_make(LPIPS)}; or set "
            "config.objective.distance=l2"
        )
    return load_auxiliary(path_of(config.lpips.weights), LPIPS)


def abstract_state(initialize: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Shapes, then shardings: the state of `initialize(*args)` before any array is made."""
    shapes = jax.eval_shape(initialize, *args)
    return with_shardings(shapes, infer_shardings(shapes, mesh))


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _jsonable(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples, so lists stand for both."""
    return json.loads(json.dumps(options))
