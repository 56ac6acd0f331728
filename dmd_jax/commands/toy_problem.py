"""The plane of the paper's Figure 3: two modes, their exact score, and two small networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmd_jax.config import value_of
from dmd_jax.distillation import build_objective, optimizers_of, preview_key
from dmd_jax.distillation.from_config import computation_of, fake_weight_of
from dmd_jax.errors import UserError
from dmd_jax.method import samplers
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.method.types import Generate
from dmd_jax.models import Denoiser, build_denoiser
from dmd_jax.models.plane.mlp import MLP
from dmd_jax.objectives import DMD, Networks, Objective
from dmd_jax.parallel.sharding import check_batch_size, make_mesh
from dmd_jax.teachers.edm import edm_teacher

# A sample belongs to the nearest mode unless that is further than this many of the mode's standard
# deviations, beyond which a Gaussian in the plane has 0.03% of its samples.
STRAY = 4.0


class Plane(NamedTuple):
    """What every objective shares."""

    objective: Callable[[DMD], Objective]
    generate: Generate
    frozen: dict[str, Any]  # of the exact real score
    schedule: NoiseSchedule
    pairs: dict[str, jax.Array]  # "z_ref", "y_ref" [R, 2]
    latents: jax.Array  # [N, 2], that the panels show
    real: np.ndarray  # [N, 2], samples of the mixture
    means: np.ndarray  # [2, 2], the modes' centres
    std: float  # of each mode
    mesh: Mesh  # one device: the work is too small to share


def make_plane(config: ConfigDict) -> Plane:
    """Builds the mixture, the networks and the pairs that a config describes.

    Raises:
      UserError: a value of the config cannot be.
    """
    mesh = make_mesh(1, devices=jax.local_devices()[:1])
    _check(config, mesh)
    toy = config.toy
    means = np.array([toy.mode1, toy.mode2], np.float32)
    mixture = build_denoiser(
        {"name": "gaussian_mixture", "means": means.tolist(), "stds": [toy.mode_std] * 2}
    )
    schedule = NoiseSchedule.edm(sigma_min=toy.sigma_min, sigma_max=toy.sigma_max)
    networks, init = _players(config, mixture)
    objective = functools.partial(
        build_objective,
        name=config.objective.name,
        teacher=edm_teacher(mixture)._replace(schedule=schedule),
        networks=networks,
        init=init,
        optimizers=optimizers_of(config),
        fake_weight=fake_weight_of(config),
        preview_key=preview_key(config),
    )
    teacher_params = mixture.init(jax.random.key(0))
    z_ref = jax.random.normal(
        jax.random.key(config.pairs.seed, impl="threefry2x32"),
        (config.pairs.count, 2),
        jnp.float32,
    )
    # Heun's default levels begin at sigma = 80, where the mixture is noise and nothing else, so
    # the pairs are of the whole mixture whatever levels the scores are compared at.
    y_ref = samplers.heun(
        mixture.denoise, teacher_params, z_ref, None, num_steps=config.pairs.num_steps
    )
    rng = np.random.default_rng(config.seed)
    real = means[rng.integers(0, 2, toy.num_samples)]
    real = real + toy.mode_std * rng.standard_normal(real.shape)
    return Plane(
        objective=objective,
        generate=networks.generate,
        frozen={"network": teacher_params},
        schedule=schedule,
        pairs={"z_ref": z_ref, "y_ref": y_ref},
        latents=jax.random.normal(preview_key(config), (toy.num_samples, 2), jnp.float32),
        real=real,
        means=means,
        std=toy.mode_std,
        mesh=mesh,
    )


def _players(config: ConfigDict, mixture: Denoiser) -> tuple[Networks, dict[str, Callable]]:
    """The functions of the three roles, and how the two that are trained start.

    Raises:
      UserError: the fake score's network takes no points of the plane.
    """
    toy = config.toy
    fake_score = build_denoiser(config.network.to_dict(), **computation_of(config))
    if (fake_score.sample_shape, fake_score.num_classes) != ((2,), 0):
        raise UserError(
            f"config.network takes samples of shape {fake_score.sample_shape} and "
            f"{fake_score.num_classes} classes; expected (2,) and 0"
        )
    # Its last layer starts at zero, so that the fakes start as one Gaussian cluster.
    network = MLP(
        dim=2,
        width=toy.generator_width,
        depth=toy.generator_depth,
        zero_init=True,
        precision=config.matmul_precision,
    )
    center, example = jnp.asarray(toy.center, jnp.float32), (jnp.zeros((1, 2)), jnp.zeros(1))

    def generate(params, z, cond):
        return center + toy.spread * z + network.apply({"params": params}, z, jnp.zeros(len(z)))

    networks = Networks(
        generate=generate,
        teacher=lambda frozen, *args: mixture.denoise(frozen["network"], *args),
        fake_score=fake_score.denoise,
    )
    return networks, {
        "generator": lambda frozen, key: network.init(jax.random.split(key)[0], *example)["params"],
        "fake_score": lambda frozen, key: fake_score.init(jax.random.split(key)[1]),
    }


def measure(points: np.ndarray, plane: Plane) -> dict[str, Any]:
    """How points [N, 2] lie about the modes.

    Returns:
      "modes", for each the "share" of the points that belong to it, their "spread" (the standard
      deviation about their own mean, root mean square over both axes, over the mode's), and the
      "distance" of that mean from the mode's centre, None where there are no points; "stray", the
      share of the points that belong to no mode.
    """
    distances = np.linalg.norm(points[:, None] - plane.means, axis=-1)
    nearest = np.where(distances.min(axis=1) > STRAY * plane.std, -1, distances.argmin(axis=1))
    modes = []
    for index, mean in enumerate(plane.means):
        cluster = points[nearest == index]
        found = {"share": len(cluster) / len(points), "spread": None, "distance": None}
        if len(cluster):
            found["spread"] = float(np.sqrt(cluster.var(axis=0).mean()) / plane.std)
            found["distance"] = float(np.linalg.norm(cluster.mean(axis=0) - mean))
        modes.append(found)
    return {"modes": modes, "stray": float(np.mean(nearest == -1))}


def _check(config: ConfigDict, mesh: Mesh) -> None:
    """Raises a UserError that names the first value that cannot be."""
    if config.toy is None:
        raise UserError("the config has no part toy; expected configs/toy2d.py or one like it")
    toy, objective = config.toy, config.objective
    if objective.name != "dmd":
        raise UserError(
            f"config.objective.name is {objective.name}; expected dmd, of which the panels are"
        )
    if config.stages or any(config.start.values()):
        raise UserError("config.stages or config.start is set; expected neither, as `toy` has none")
    if objective.match_reference or not objective.use_fake_score or not objective.matching_weight:
        raise UserError(
            "config.objective: match_reference is set, use_fake_score is not, or matching_weight "
            "is 0; expected the method as it is, of which the panels leave out parts themselves"
        )
    if config.steps == 0:
        raise UserError("config.steps is 0; expected at least 1")
    for key, other in (("steps", "log_every"), ("log_every", "objective.generator_every")):
        value, part = config[key], value_of(config, other)
        if value % part:
            raise UserError(
                f"config.{key} is {value}; expected a multiple of config.{other}={part}"
            )
    if toy.sigma_min >= toy.sigma_max:
        raise UserError(
            f"config.toy.sigma_min, sigma_max is {toy.sigma_min, toy.sigma_max}; expected positive "
            "levels in order"
        )
    for key, size in (("batch_size", config.batch_size), ("pairs.count", config.pairs.count)):
        check_batch_size(size, mesh, accumulation=config.accumulation, name=f"config.{key}")
