"""The exact denoiser of a mixture of isotropic Gaussians: a teacher that needs no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method.schedules import NoiseLevel


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """p(x0) = sum_k weights[k] N(means[k], stds[k]^2 I), described by numbers.

    Raises:
      UserError: shapes that do not agree, a std or weight that is not positive.
    """

    means: Sequence[Sequence[float]]  # [K, D]
    stds: Sequence[float]  # [K]
    weights: Sequence[float] | None = None  # [K], need not sum to one; None is equal weights

    def __post_init__(self):
        try:
            means, stds, weights = self._arrays()
        except (TypeError, ValueError) as error:
            raise UserError(
                "gaussian_mixture means, stds or weights are not arrays of numbers; expected "
                f"shapes [K, D], [K], [K] ({error})"
            ) from None
        if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != stds.shape:
            raise UserError(
                f"gaussian_mixture means, stds, weights have shapes {means.shape}, {stds.shape}, "
                f"{weights.shape}; expected [K, D], [K], [K]"
            )
        if not (np.all(stds > 0) and np.all(weights > 0) and np.all(np.isfinite(means))):
            raise UserError("gaussian_mixture: expected finite means and positive stds and weights")

    @property
    def sample_shape(self) -> tuple[int]:
        return (len(self.means[0]),)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """The parameters {"means", "stds", "weights"}; the key has no influence."""
        del key
        names = ("means", "stds", "weights")
        return {name: jnp.asarray(value) for name, value in zip(names, self._arrays())}

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights = np.ones(len(self.stds)) if self.weights is None else self.weights
        return tuple(np.asarray(v, np.float32) for v in (self.means, self.stds, weights))


def mixture_denoise(params, x_t: jax.Array, level: NoiseLevel, cond=None) -> jax.Array:
    """E[x0 | x_t] of the mixture, in closed form at any alpha and any sigma > 0.

    Component k explains x_t as N(alpha m_k, v_k I), v_k = alpha^2 s_k^2 + sigma^2, and then
    expects x0 = m_k + alpha s_k^2 / v_k (x_t - alpha m_k); the components are averaged by their
    posterior weights.

    Args:
      params: {"means" [K, D], "stds" [K], "weights" [K]}.
      x_t: [B, D]. level: arrays of shape [B]. cond: ignored, the mixture has no classes.

    Returns:
      x0, float32 [B, D].
    """
    del cond
    means, var0 = params["means"], jnp.square(params["stds"])
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]  # [B, 1]
    variance = alpha**2 * var0 + sigma**2  # [B, K]
    offset = x_t.astype(jnp.float32)[:, None, :] - alpha[:, :, None] * means  # [B, K, D]
    log_posterior = (
        jnp.log(params["weights"])
        - 0.5 * means.shape[-1] * jnp.log(variance)
        - 0.5 * jnp.sum(offset**2, axis=-1) / variance
    )
    posterior = jax.nn.softmax(log_posterior, axis=-1)
    expected = means + (alpha * var0 / variance)[:, :, None] * offset
    return jnp.sum(posterior[:, :, None] * expected, axis=1)
