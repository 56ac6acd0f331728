"""Images from weights in any number: latents and labels by index, batches over the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import samplers
from dmd_jax.errors import UserError
from dmd_jax.models import Denoiser
from dmd_jax.sharding import batch_sharding, make_mesh, place, program_for, replicated
from dmd_jax.state import Role, key_data, role_key
from dmd_jax.weights import Weights, denoiser_of

SAMPLERS = ("one-step", "heun", "euler")
# By which images of a seed are drawn; what is kept of a seed's images names them beside it.
DRAWS = {role.name.lower(): int(role) for role in (Role.SAMPLE_LATENTS, Role.SAMPLE_LABELS)}


class ImageMaker:
    """Makes images from weights on this process's devices, one compiled program for all.

    Args:
      sampler: one of SAMPLERS. num_steps: of heun and euler.
      batch_size: images at a time; rounded up to a multiple of the devices.
      dtype, precision: that the network computes in, as for models.build_denoiser.
      sampler_options: s_churn and so on, for heun and euler.

    Raises:
      UserError: an unknown sampler, or options that it does not take.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        sampler: str,
        num_steps: int = 18,
        batch_size: int = 256,
        dtype: str = "float32",
        precision: str = "highest",
        sampler_options: dict[str, float] | None = None,
    ):
        denoiser = denoiser_of(weights, dtype=dtype, precision=precision)
        if denoiser.cond_shape is not None:
            raise UserError(
                f"{weights.description}: network {weights.network['name']} makes images of text; "
                "expected one of classes, or of none"
            )
        self.sample_shape, self.num_classes = denoiser.sample_shape, denoiser.num_classes
        self._devices = LocalDevices(batch_size)
        self.batch_size = self._devices.batch_size
        self._params = self._devices.replicate(weights.params)
        self._sample = self._devices.compile(
            image_sampler(sampler, denoiser, num_steps, sampler_options or {})
        )

    def __call__(
        self, z: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0, first: int = 0
    ) -> np.ndarray:
        """Images float32 [N, *sample_shape] from latents of that shape and labels [N].

        Raises UserError for latents or labels of another shape or type, and labels that the
        network does not have.

        Args:
          labels: integers; None for a network without classes, which takes zeros as well.
          seed: of the noise that a stochastic sampler adds.
          first: the index of z[0] among the images of the seed; each batch's noise is a function
            of the seed and the index of the batch's first image.
        """
        return np.concatenate(list(self.batches(z, labels, seed=seed, first=first)))

    def batches(
        self, z: np.ndarray, labels: np.ndarray | None = None, *, seed: int = 0, first: int = 0
    ) -> Iterator[np.ndarray]:
        """The same, batch by batch."""
        z = checked_latents(z, self.sample_shape)
        labels = self._checked_labels(labels, len(z))
        for start, count, (part, cond) in self._devices.batches(z, labels):
            key = role_key(key_data(seed), first + start, Role.SAMPLER_NOISE)
            yield np.asarray(self._sample(self._params, part, cond, key))[:count]

    def _checked_labels(self, labels: np.ndarray | None, count: int) -> np.ndarray | None:
        """Labels int32 [count]; on a device a wrong one would be no class, without an error."""
        if labels is None:
            if self.num_classes:
                raise UserError(
                    f"labels are None; expected integers [{count}] of the network's "
                    f"{self.num_classes} classes"
                )
            return None
        labels = np.asarray(labels)
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise UserError(
                f"labels are {labels.dtype} of shape {labels.shape}; expected integers [{count}], "
                "one for each latent"
            )
        wrong = labels[(labels < 0) | (labels >= max(self.num_classes, 1))]
        if wrong.size and self.num_classes:
            raise UserError(f"label {wrong[0]}; expected 0 to {self.num_classes - 1}")
        if wrong.size:
            raise UserError(f"label {wrong[0]} for a network without classes; expected None")
        return labels.astype(np.int32) if self.num_classes else None


class LocalDevices:
    """This process's devices, which share the rows of batches of one size.

    Args:
      batch_size: rows at a time; rounded up to a multiple of the devices.
      devices: all of them by default.
    """

    def __init__(self, batch_size: int, devices: Sequence[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        self._mesh = make_mesh(devices=devices)
        self.batch_size = -(-batch_size // len(devices)) * len(devices)

    def replicate(self, tree: Any) -> Any:
        """A copy of a tree of host arrays on each device."""
        return place(tree, jax.tree.map(lambda _: replicated(self._mesh), tree))

    def compile(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """`function` under jit; its result is a batch."""

        def on_mesh(*args: Any) -> jax.Array:
            with program_for(self._mesh):
                return function(*args)

        return jax.jit(on_mesh, out_shardings=batch_sharding(self._mesh))

    def batches(
        self, *arrays: np.ndarray | None
    ) -> Iterator[tuple[int, int, list[jax.Array | None]]]:
        """Of arrays [N, …]: the first row of each batch, its number of rows, and the batch.

        A batch that has fewer rows is filled up, since one shape is one program. None stays None.
        """
        sharding = batch_sharding(self._mesh)
        total = len(arrays[0])
        for start in range(0, total, self.batch_size):
            stop = min(start + self.batch_size, total)
            parts = [None if rows is None else rows[start:stop] for rows in arrays]
            batch = [
                None if part is None else jax.device_put(pad_rows(part, self.batch_size), sharding)
                for part in parts
            ]
            yield start, stop - start, batch


def checked_latents(z: np.ndarray, sample_shape: tuple[int, ...]) -> np.ndarray:
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


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """rows [N, …] to [count, …], count >= N >= 1, by repeating the last row."""
    missing = count - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def draw_latents(
    seed: int,
    start: int,
    stop: int,
    sample_shape: tuple[int, ...],
    *,
    role: Role = Role.SAMPLE_LATENTS,
) -> np.ndarray:
    """z ~ N(0, I) for the images start..stop-1, float32 [stop - start, *sample_shape].

    Args:
      role: Role.PAIR_LATENTS for pairs. Image i's latent is a function of (seed, i, role), so that
        a generator is never judged by the latents that it was trained on.
    """
    indices = jnp.arange(start, stop, dtype=jnp.int32)
    return np.asarray(_latents(key_data(seed), indices, sample_shape, role))


def draw_labels(
    seed: int, start: int, stop: int, num_classes: int, *, role: Role = Role.SAMPLE_LABELS
) -> np.ndarray:
    """Labels uniform over the classes for the images start..stop-1, int32; 0 without classes.

    Args:
      role: Role.PAIR_LABELS for pairs, as for `draw_latents`.
    """
    indices = jnp.arange(start, stop, dtype=jnp.int32)
    return np.asarray(_labels(key_data(seed), indices, max(num_classes, 1), role))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _latents(base, indices, sample_shape, role):
    def draw(index):
        return jax.random.normal(role_key(base, index, role), sample_shape, jnp.float32)

    return jax.vmap(draw)(indices)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _labels(base, indices, num_classes, role):
    def draw(index):
        return jax.random.randint(role_key(base, index, role), (), 0, num_classes, jnp.int32)

    return jax.vmap(draw)(indices)


def image_sampler(
    name: str, denoiser: Denoiser, num_steps: int, options: dict[str, float]
) -> Callable[[Any, jax.Array, Any, jax.Array], jax.Array]:
    """(params, z, cond, key) -> images, by one of SAMPLERS.

    Args:
      options: s_churn and so on, for heun and euler.

    Raises:
      UserError: an unknown sampler, or options that it does not take.
    """
    if name == "one-step":
        if options:
            raise UserError(f"the one-step sampler takes no {', '.join(options)}")
        return lambda params, z, cond, key: samplers.one_step(
            denoiser.denoise, params, z, cond, schedule=denoiser.schedule
        )
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}")
    if num_steps < 1:
        raise UserError(f"{num_steps} sampling steps; expected at least 1")
    function = {"heun": samplers.heun, "euler": samplers.euler}[name]
    return lambda params, z, cond, key: function(
        denoiser.denoise, params, z, cond, num_steps=num_steps, key=key, **options
    )
