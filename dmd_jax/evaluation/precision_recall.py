"""Precision and recall of samples: which lie among the reals, and which reals lie among them."""

from __future__ import annotations

import numpy as np

from dmd_jax.errors import UserError

NEIGHBOURS = 3
CHUNK = 1024  # rows of the distance matrix in memory at a time


def precision_recall(
    real: np.ndarray, samples: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """The shares of samples within the reals' manifold, and of reals within the samples'.

    A set's manifold is the union of balls around its points, each reaching as far as that point's
    k-th nearest other point of the set. Euclidean distances in float64; the whole of both sets is
    compared, so time grows with the square of their sizes. Source: arXiv 1904.06991, Section 3.

    Args:
      real: features [N, D], N > neighbours. samples: features [M, D], M > neighbours.

    Raises:
      UserError: shapes that are not these.
    """
    real, samples = np.asarray(real, np.float64), np.asarray(samples, np.float64)
    for name, points in (("real", real), ("samples", samples)):
        if points.ndim != 2 or points.shape[1] != real.shape[-1] or len(points) <= neighbours:
            raise UserError(
                f"precision and recall: {name} of shape {points.shape}, expected "
                f"(more than {neighbours}, D) and one D"
            )
    # Distances do not change, and their squares lose fewer digits to cancellation.
    centre = real.mean(axis=0)
    real, samples = real - centre, samples - centre
    precision = _share_within(samples, real, _radii(real, neighbours))
    recall = _share_within(real, samples, _radii(samples, neighbours))
    return precision, recall


def _radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance [N] of each point to its k-th nearest other point."""
    radii = []
    for start in range(0, len(points), CHUNK):
        distances = _squared_distances(points[start : start + CHUNK], points)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # a point is no neighbour of its own
        radii.append(np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1])
    return np.concatenate(radii)


def _share_within(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    """The share of points that some ball reaches; radii are squared."""
    inside = 0
    for start in range(0, len(points), CHUNK):
        distances = _squared_distances(points[start : start + CHUNK], centres)
        inside += np.count_nonzero((distances <= radii).any(axis=1))
    return float(inside / len(points))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)
    return np.maximum(squares - 2 * a @ b.T, 0)
