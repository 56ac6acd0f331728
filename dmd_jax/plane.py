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

from dmd_jax import samplers, state
from dmd_jax.errors import UserError
from dmd_jax.experiment import computation_of, generator_steps_per_update
from dmd_jax.models import build_denoiser
from dmd_jax.models.mlp import MLP
from dmd_jax.objective import Networks
from dmd_jax.schedules import NoiseSchedule
from dmd_jax.sharding import check_batch_size, make_mesh, replicated

# A sample belongs to the nearest mode unless that is further than this many of the mode's standard
# deviations, beyond which a Gaussian in the plane has 0.03% of its samples.
STRAY = 4.0


class Plane(NamedTuple):
    """What every objective shares."""

    networks: Networks
    teacher_params: dict[str, jax.Array]  # of the exact real score
    initialize: Callable[[], state.TrainState]  # the same values at every call
    optimizers: tuple[Any, Any]  # of the generator and of the fake score
    schedule: NoiseSchedule
    pairs: dict[str, jax.Array]  # "z_ref", "y_ref" [R, 2], "label" [R]
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
    center = jnp.asarray(toy.center, jnp.float32)

    def generate(params, z, cond):
        return center + toy.spread * z + network.apply({"params": params}, z, jnp.zeros(len(z)))

    optimizers = tuple(
        state.adamw(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            steps_per_update=steps_per_update,
            weight_decay=config.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            clip_norm=config.clip_norm,
        )
        for learning_rate, warmup_steps, steps_per_update in (
            (config.learning_rate, config.warmup_steps, generator_steps_per_update(config)),
            (config.fake_score_learning_rate, toy.fake_score_warmup_steps, 1),
        )
    )

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def initialize() -> state.TrainState:
        key = state.role_key(state.key_data(config.seed), 0, state.Role.INIT)
        generator_key, fake_key = jax.random.split(key)
        return state.train_state(
            network.init(generator_key, jnp.zeros((1, 2)), jnp.zeros(1))["params"],
            fake_score.init(fake_key),
            optimizer=optimizers[0],
            fake_optimizer=optimizers[1],
            use_ema=config.ema_decay > 0,
            seed=config.seed,
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
    preview_key = state.role_key(state.key_data(config.seed), 0, state.Role.PREVIEW)
    return Plane(
        networks=Networks(generate, mixture.denoise, fake_score.denoise),
        teacher_params=teacher_params,
        initialize=initialize,
        optimizers=optimizers,
        schedule=NoiseSchedule.edm(sigma_min=toy.sigma_min, sigma_max=toy.sigma_max),
        pairs={"z_ref": z_ref, "y_ref": y_ref, "label": jnp.zeros(len(z_ref), jnp.int32)},
        latents=jax.random.normal(preview_key, (toy.num_samples, 2), jnp.float32),
        real=real,
        means=means,
        std=toy.mode_std,
        mesh=mesh,
    )


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
    if "toy" not in config:
        raise UserError("the config has no part toy; expected configs/toy2d.py or one like it")
    toy = config.toy

    def require(holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            raise UserError(f"config.{key} is {value!r}; expected {expected}")

    for key in ("steps", "log_every"):
        require(config[key] > 0, key, config[key], "at least 1")
    for key in ("generator_width", "generator_depth", "num_samples", "mode_std", "spread"):
        require(toy[key] > 0, f"toy.{key}", toy[key], "more than 0")
    for key in ("mode1", "mode2", "center"):
        point = toy[key]
        plain = len(point) == 2 and all(isinstance(each, (int, float)) for each in point)
        require(plain and np.isfinite(point).all(), f"toy.{key}", point, "a point (x, y)")
    for key, part in (("steps", "log_every"), ("log_every", "generator_every")):
        multiple = f"a multiple of config.{part}={config[part]}"
        require(config[key] % config[part] == 0, key, config[key], multiple)
    require(
        0 < toy.sigma_min < toy.sigma_max,
        "toy.sigma_min, sigma_max",
        (toy.sigma_min, toy.sigma_max),
        "positive levels in order",
    )
    for key, size in (("batch_size", config.batch_size), ("pairs.count", config.pairs.count)):
        check_batch_size(size, mesh, accumulation=config.accumulation, name=f"config.{key}")
