"""The figures of an evaluation, from features that are kept in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dmd_jax.evaluation.features import Features
from dmd_jax.evaluation.frechet import Statistics, frechet_distance, gather
from dmd_jax.evaluation.inception_score import inception_score
from dmd_jax.evaluation.kernel_distance import kernel_distance
from dmd_jax.evaluation.parts import Rows
from dmd_jax.evaluation.precision_recall import NEIGHBOURS, precision_recall
from dmd_jax.evaluation.reference import evenly

JOINED = 4096  # rows in memory at a time
# What the kernel distance draws its subsets from, of each side at most: rows, and numbers (800 MB).
POOL_ROWS, POOL_NUMBERS = 50_000, 100_000_000


def measure(
    features: list[Features],
    samples: Rows,
    real: Rows | None,
    reference: Statistics | None,
    num_neighbours: int,
    kid_subsets: int,
) -> tuple[dict[str, dict[str, Any]], list[Statistics]]:
    """All figures of all features.

    Args:
      samples: their features, as arrays "features_0" and so on.
      real: the same of the real images; None where only their statistics are known, `reference`.
      num_neighbours: images of each side for precision and recall, at most.
      kid_subsets: of the kernel distance; 0 leaves it out.

    Returns:
      By name: "frechet_distance", "feature_dimensions", "origin", what they depend on;
      "inception_score" where the features have logits; "kernel_distance" where there are two real
      images, "precision" and "recall" where there are enough. And the reference's statistics, in
      the features' order.

    Warns where a covariance has too few samples.
    """
    figures, references = {}, []
    for number, one in enumerate(features):
        key = f"features_{number}"
        ours = gather(_joined(samples.read(key)))
        theirs = gather(_joined(real.read(key))) if real else reference
        found = {"frechet_distance": frechet_distance(ours, theirs)}
        if one.logits is not None:
            mean, std = inception_score(
                (one.logits(part) for part in _joined(samples.read(key))), samples.count
            )
            found["inception_score"] = {"mean": mean, "std": std}
        if real and min(num_neighbours, real.count, samples.count) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(
                _evenly(real, key, num_neighbours), _evenly(samples, key, num_neighbours)
            )
        if real and kid_subsets and real.count > 1:
            pool = min(POOL_ROWS, POOL_NUMBERS // ours.mean.size)
            found["kernel_distance"] = kernel_distance(
                _evenly(real, key, pool), _evenly(samples, key, pool), subsets=kid_subsets
            )
        found["feature_dimensions"] = ours.mean.size
        if one.origin:
            found["origin"] = one.origin
        figures[one.name] = found
        references.append(theirs)
    return figures, references


def _joined(parts: Iterable[tuple[np.ndarray]]) -> Iterator[np.ndarray]:
    """The same rows in larger batches: each costs a covariance, however small it is."""
    held: list[np.ndarray] = []
    for (part,) in parts:
        held.append(part)
        if sum(map(len, held)) >= JOINED:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _evenly(rows: Rows, key: str, num: int) -> np.ndarray:
    """At most `num` rows, evenly spread: reals may be sorted by class."""
    wanted, chosen, start = evenly(rows.count, num), [], 0
    for (part,) in rows.read(key):
        stop = start + len(part)
        chosen.append(part[wanted[(wanted >= start) & (wanted < stop)] - start])
        start = stop
    return np.concatenate(chosen)
