"""The kernel distance against its definition, closed forms and scikit-learn's kernel."""

import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from dmd_jax.errors import UserError
from dmd_jax.evaluation.kernel_distance import kernel_distance


def drawn(seed, count, dimensions, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dimensions)).astype(np.float32) + np.float32(shift)


def by_the_definition(real, samples):
    """The unbiased estimate, pair by pair, in float64."""
    d = real.shape[1]

    def kernel(a, b):
        return (float(np.dot(a.astype(np.float64), b.astype(np.float64))) / d + 1) ** 3

    def within(points):
        pairs = list(itertools.permutations(points, 2))
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    across = [kernel(a, b) for a in real for b in samples]
    return within(real) + within(samples) - 2 * sum(across) / len(across)


def test_one_subset_of_all_is_the_definition():
    real, samples = drawn(0, 12, 7), drawn(1, 12, 7, shift=0.4)
    found = kernel_distance(real, samples, subsets=1)
    np.testing.assert_allclose(found["mean"], by_the_definition(real, samples), rtol=1e-12)
    assert found["std"] == 0 and (found["subsets"], found["subset_size"]) == (1, 12)


def test_subsets_are_averaged():
    """Of three vectors two: the mean over many draws is that over all pairs of subsets."""
    real, samples = drawn(2, 3, 5), drawn(3, 4, 5, shift=1.0)
    every = [
        by_the_definition(real[list(a)], samples[list(b)])
        for a in itertools.combinations(range(3), 2)
        for b in itertools.combinations(range(4), 2)
    ]
    found = kernel_distance(real, samples, subsets=20_000, subset_size=2)
    error = np.std(every) / np.sqrt(20_000)
    assert abs(found["mean"] - np.mean(every)) < 4 * error
    np.testing.assert_allclose(found["std"], np.std(every), rtol=0.03)
    assert found["subset_size"] == 2


def test_large_sets_agree_with_scikit_learns_kernel():
    real, samples = drawn(4, 300, 64, shift=3.0), drawn(5, 300, 64, shift=3.1)
    x, y = real.astype(np.float64), samples.astype(np.float64)
    xx, yy, xy = (polynomial_kernel(*pair) for pair in ((x, x), (y, y), (x, y)))
    off = ~np.eye(300, dtype=bool)
    expected = xx[off].mean() + yy[off].mean() - 2 * xy.mean()
    np.testing.assert_allclose(
        kernel_distance(real, samples, subsets=1)["mean"], expected, rtol=1e-9
    )


def test_point_masses_have_a_closed_form():
    # All vectors of a set equal: (a.a/D + 1)^3 + (b.b/D + 1)^3 - 2 (a.b/D + 1)^3.
    a, b = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    expected = 3.5**3 + 6.0**3 - 2 * 1.5**3
    found = kernel_distance(np.tile(a, (5, 1)), np.tile(b, (9, 1)))
    np.testing.assert_allclose(found["mean"], expected, rtol=1e-14)
    assert found["std"] < 1e-12 and found["subset_size"] == 5


def test_equal_distributions_are_near_zero_on_either_side():
    values = [
        kernel_distance(drawn(2 * i, 50, 16), drawn(2 * i + 1, 50, 16), subsets=1)["mean"]
        for i in range(200)
    ]
    assert min(values) < 0 < max(values)  # unbiased, so it can be negative
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)


def test_the_same_features_give_the_same_figure_and_a_seed_another():
    real, samples = drawn(6, 40, 8), drawn(7, 50, 8)
    first = kernel_distance(real, samples, subset_size=10)
    assert kernel_distance(real, samples, subset_size=10) == first
    assert kernel_distance(real, samples, subset_size=10, seed=1)["mean"] != first["mean"]


@pytest.mark.parametrize(
    ("real", "samples", "options", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), {}, r"samples of shape \(3, 4\)"),
        (np.zeros((1, 2)), np.zeros((3, 2)), {}, r"real of shape \(1, 2\)"),
        (np.zeros(3), np.zeros((3, 2)), {}, r"real of shape \(3,\)"),
        (np.zeros((3, 2)), np.full((3, 2), np.inf), {}, "samples hold NaN or infinity"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"subsets": 0}, "0 subsets of 1000"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"subset_size": 1}, "100 subsets of 1;"),
    ],
)
def test_bad_input_is_refused(real, samples, options, message):
    with pytest.raises(UserError, match=message):
        kernel_distance(real, samples, **options)
