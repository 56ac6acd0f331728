"""Precision and recall against scikit-learn's neighbours and against sets drawn on paper."""

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from dmd_jax.errors import UserError
from dmd_jax.evaluation import precision_recall as module
from dmd_jax.evaluation.precision_recall import precision_recall


def by_scikit_learn(real, samples, neighbours):
    def share(points, centres):
        found = NearestNeighbors(n_neighbors=neighbours).fit(centres).kneighbors()
        radii = found[0][:, -1]
        return (pairwise_distances(points, centres) <= radii).any(axis=1).mean()

    return share(samples, real), share(real, samples)


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_shares_equal_scikit_learns(monkeypatch, chunk, neighbours):
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    # Far from the origin, where squared distances would lose digits.
    real = 1e4 + rng.standard_normal((60, 4))
    samples = 1e4 + 0.7 + 0.8 * rng.standard_normal((45, 4))
    found = precision_recall(real, samples, neighbours=neighbours)
    assert found == by_scikit_learn(real, samples, neighbours)
    assert 0 < found[0] < 1 and 0 < found[1] < 1


def test_samples_of_one_mode_are_precise_and_miss_the_other():
    # Two clusters of four points each, each point 1, 2, 3 from the others of its cluster.
    cluster = np.arange(4.0)[:, None]
    real = np.concatenate([cluster, 100 + cluster])
    assert precision_recall(real, cluster + 0.5) == (1.0, 0.5)
    # The ends of the cluster reach 3, the middle 2: from -3 to 6.
    samples = np.array([[-3.25], [-2.75], [5.75], [6.25]])
    assert precision_recall(real, samples)[0] == 0.5


def test_equal_sets_are_wholly_precise_and_recalled():
    points = np.random.default_rng(1).standard_normal((20, 3))
    assert precision_recall(points, points) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("real", "samples", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), r"real of shape \(3, 2\), expected \(more than 3"),
        (np.zeros((9, 2)), np.zeros((3, 2)), r"samples of shape \(3, 2\)"),
        (np.zeros((9, 2)), np.zeros((9, 3)), r"samples of shape \(9, 3\)"),
        (np.zeros(9), np.zeros((9, 9)), r"real of shape \(9,\)"),
    ],
)
def test_sets_that_do_not_fit_are_refused(real, samples, message):
    with pytest.raises(UserError, match=message):
        precision_recall(real, samples)
