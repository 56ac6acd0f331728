"""The kernel distance of two sets of features; with Inception's it is the KID."""

from __future__ import annotations

import numpy as np

from dmd_jax.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000  # of the published figures
_SEED = 0  # of the subsets, so that the same features give the same figure


def kernel_distance(
    real: np.ndarray,
    samples: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = _SEED,
) -> dict[str, float | int]:
    """The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, float64.

    Each subset draws as many reals as samples without replacement, and takes the unbiased estimate,
    which leaves out each vector's kernel with itself and can be negative. Unlike the Fréchet
    distance it has no bias that depends on the number of samples. Source: arXiv 1801.01401, Section
    4; subsets as in its authors' code.

    Args:
      real: features [N, D]. samples: features [M, D].
      subset_size: of either side; fewer where there are fewer vectors.

    Returns:
      "mean" and "std" over the subsets, "subsets", and "subset_size" as it was.

    Raises:
      UserError: shapes that are not these, fewer than two vectors, or values that are not finite.
    """
    real, samples = np.asarray(real), np.asarray(samples)
    for name, points in (("real", real), ("samples", samples)):
        if points.ndim != 2 or points.shape[1] != real.shape[-1] or len(points) < 2:
            raise UserError(
                f"kernel distance: {name} of shape {points.shape}, expected (2 or more, D) and one "
                "D"
            )
        if not np.isfinite(points).all():
            raise UserError(f"kernel distance: {name} hold NaN or infinity, expected numbers")
    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"kernel distance: {subsets} subsets of {subset_size}; expected 1 or more, of 2 or more"
        )
    size = min(subset_size, len(real), len(samples))
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            points[rng.choice(len(points), size, replace=False)].astype(np.float64)
            for points in (real, samples)
        )
        within = sum(_sum_of_others(_kernel(points, points)) for points in (x, y))
        estimates.append(within / (size * (size - 1)) - 2 * _kernel(x, y).mean())
    return {
        "mean": float(np.mean(estimates)),
        "std": float(np.std(estimates)),
        "subsets": subsets,
        "subset_size": size,
    }


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    root = x @ y.T / x.shape[1] + 1
    return root * root * root


def _sum_of_others(kernel: np.ndarray) -> float:
    return kernel.sum() - np.trace(kernel)
