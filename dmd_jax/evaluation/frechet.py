"""The Fréchet distance between the Gaussians fitted to two sets of features.

With Inception features this is the FID (arXiv 1706.08500); the arithmetic is the same for any
features. Everything is float64 and NumPy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dmd_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Statistics:
    """Count, mean and unbiased covariance of feature vectors; `a + b` is that of both together.

    A published reference needs no features: `Statistics(None, mu, sigma)`.

    Raises:
      UserError: mean and covariance do not fit each other, or hold values that are not finite.
    """

    count: int | None  # None: unknown, as where only moments were published
    mean: np.ndarray  # [D] float64
    covariance: np.ndarray  # [D, D] float64, divided by count - 1; zero where count is 1

    def __post_init__(self) -> None:
        mean = np.asarray(self.mean, np.float64)
        covariance = np.asarray(self.covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise UserError(
                f"feature statistics: mean {mean.shape} and covariance {covariance.shape}, "
                "expected shapes (D,) and (D, D)"
            )
        if self.count is not None and self.count < 1:
            raise UserError(f"feature statistics: count is {self.count}, expected at least 1")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError("feature statistics: a value is not finite, expected numbers")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """The statistics of features [N, D], N >= 1.

        Raises:
          UserError: `features` is not a non-empty matrix, or holds values that are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or 0 in features.shape:
            raise UserError(f"features: shape {features.shape}, expected (N, D), both at least 1")
        bad_rows = np.count_nonzero(~np.isfinite(features).all(axis=1))
        if bad_rows:
            raise UserError(
                f"features: {bad_rows} of {len(features)} samples hold NaN or infinity, "
                "expected finite numbers"
            )
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred / max(len(features) - 1, 1))

    def __add__(self, other: Statistics) -> Statistics:
        """Merges without going through raw second moments, which would cancel (Chan et al. 1979).

        Raises:
          UserError: the two have different dimensions, or a count is unknown.
        """
        _require_equal_dimensions(self, other)
        if self.count is None or other.count is None:
            raise UserError("feature statistics: a count is unknown, expected one to merge them by")
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = (
            (self.count - 1) * self.covariance
            + (other.count - 1) * other.covariance
            + np.outer(shift, shift) * (self.count * other.count / count)
        )
        return Statistics(count, self.mean + shift * (other.count / count), scatter / (count - 1))


def gather(batches: Iterable[np.ndarray]) -> Statistics:
    """The statistics of features that arrive in batches [N_i, D], one batch in memory at a time.

    Raises:
      UserError: there is no batch, or a batch is not one that `Statistics.of` takes.
    """
    total = None
    for batch in batches:
        part = Statistics.of(batch)
        total = part if total is None else total + part
    if total is None:
        raise UserError("features: no batch was given, expected at least one")
    return total


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), in squared units of the features.

    A B is similar to the symmetric F^T B F with A = F F^T, whose eigenvalues are real and, but for
    rounding, not negative: no square root of a non-symmetric matrix is taken, and covariances of
    any rank do. Source: Dowson and Landau 1982; arXiv 1706.08500, Eq. 6.

    Warns where a covariance is known to be estimated from no more samples than it has dimensions:
    the distance is then mostly estimation bias.

    Raises:
      UserError: the two have different dimensions.
    """
    _require_equal_dimensions(a, b)
    dimensions = a.mean.size
    fewest = min((count for count in (a.count, b.count) if count is not None), default=None)
    if fewest is not None and fewest <= dimensions:
        warnings.warn(
            f"Fréchet distance of {dimensions}-dimensional features from {fewest} samples: a "
            f"covariance needs more than {dimensions}, so the distance is mostly estimation bias",
            stacklevel=2,
        )
    eigenvalues, eigenvectors = np.linalg.eigh(a.covariance)
    factor = eigenvectors * np.sqrt(np.maximum(eigenvalues, 0.0))
    product = np.linalg.eigvalsh(factor.T @ b.covariance @ factor)
    cross_trace = np.sqrt(np.maximum(product, 0.0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.sum((a.mean - b.mean) ** 2) + traces - 2.0 * cross_trace
    # Rounding can take the distance of two equal Gaussians a hair below zero.
    return max(float(distance), 0.0)


def _require_equal_dimensions(a: Statistics, b: Statistics) -> None:
    if a.mean.size != b.mean.size:
        raise UserError(
            f"feature statistics: {a.mean.size} dimensions against {b.mean.size}, "
            "expected the same features on both sides"
        )
