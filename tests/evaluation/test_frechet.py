"""Fréchet distance against pytorch-fid's number and against closed forms."""

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.frechet import Statistics, frechet_distance, gather


def rotation(dimensions, seed):
    matrix = np.random.default_rng(seed).standard_normal((dimensions, dimensions))
    return np.linalg.qr(matrix)[0]


def test_distance_equals_pytorch_fid(golden):
    arrays = golden("frechet")
    distance = frechet_distance(Statistics.of(arrays["fd_a"]), Statistics.of(arrays["fd_b"]))
    np.testing.assert_allclose(distance, arrays["fd"], rtol=1e-6)


def test_statistics_equal_numpy_whatever_the_batches():
    # A mean far from zero is what raw second moments would lose digits on.
    features = np.random.default_rng(0).standard_normal((501, 7)) + 1e6
    for sizes in ([501], [1, 500], [100, 1, 300, 100], [1] * 501):
        batches = np.split(features, np.cumsum(sizes)[:-1])
        statistics = gather(batches)
        assert statistics.count == 501
        np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [401, 32, 1])
def test_moments_are_exact_however_far_from_zero(dtype, batch):
    """Against whole numbers of any size: sums of float32, or of squares, would lose every digit."""
    spread = np.random.default_rng(8).integers(0, 128, (401, 5))
    rows = (2**16 + spread).astype(dtype)  # float32 holds these exactly, not their squares
    whole = [[int(value) for value in row] for row in rows]
    n, sums = len(whole), [sum(column) for column in zip(*whole)]
    products = [[sum(r[i] * r[j] for r in whole) for j in range(5)] for i in range(5)]
    covariance = [
        [(n * products[i][j] - sums[i] * sums[j]) / (n * (n - 1)) for j in range(5)]
        for i in range(5)
    ]
    found = gather(rows[start : start + batch] for start in range(0, n, batch))
    np.testing.assert_allclose(found.mean, [total / n for total in sums], rtol=1e-14)
    np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-8)
    assert found.covariance.max() > 1000


def test_merging_is_the_same_in_either_order():
    features = np.random.default_rng(1).standard_normal((60, 5))
    a, b = Statistics.of(features[:20]), Statistics.of(features[20:])
    np.testing.assert_allclose((a + b).covariance, (b + a).covariance, atol=1e-14)


def test_statistics_of_float32_features_are_float64():
    statistics = Statistics.of(np.ones((3, 2), np.float32))
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


def test_commuting_covariances_have_a_closed_form():
    # In a common eigenbasis the trace term is the sum of (sqrt(a_i) - sqrt(b_i))^2.
    basis = rotation(6, seed=2)
    a = np.array([4.0, 1.0, 9.0, 0.25, 1e-3, 2.0])
    b = np.array([1.0, 16.0, 9.0, 1.0, 1e3, 0.5])
    mean_a, mean_b = np.arange(6.0), np.ones(6)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    distance = frechet_distance(
        Statistics(100, mean_a, basis * a @ basis.T), Statistics(100, mean_b, basis * b @ basis.T)
    )
    np.testing.assert_allclose(distance, expected, rtol=1e-10)


def test_two_dimensional_covariances_that_do_not_commute():
    # tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for 2 by 2 matrices.
    a = np.array([[2.0, 0.6], [0.6, 1.0]])
    b = np.array([[1.0, -0.8], [-0.8, 3.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    distance = frechet_distance(Statistics(9, np.zeros(2), a), Statistics(9, np.zeros(2), b))
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


@pytest.mark.parametrize("swap", [False, True])
def test_rank_one_covariances_have_a_closed_form(swap):
    # A = u u^T, B = v v^T: tr (AB)^(1/2) = |u . v|.
    u, v = np.random.default_rng(3).standard_normal((2, 40))
    a = Statistics(100, np.zeros(40), np.outer(u, u))
    b = Statistics(100, np.zeros(40), np.outer(v, v))
    distance = frechet_distance(b, a) if swap else frechet_distance(a, b)
    np.testing.assert_allclose(distance, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-6)


def test_rank_deficient_against_full_rank():
    # A = u u^T, B = I: tr A^(1/2) = |u|.
    u = np.random.default_rng(4).standard_normal(30)
    a = Statistics(100, np.zeros(30), np.outer(u, u))
    b = Statistics(100, np.zeros(30), np.eye(30))
    expected = u @ u + 30 - 2 * np.linalg.norm(u)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)


def test_distance_to_itself_is_zero_and_never_negative():
    basis = rotation(50, seed=5)
    covariance = basis * np.logspace(-18, 2, 50) @ basis.T
    statistics = Statistics(1000, np.ones(50), covariance)
    assert 0.0 <= frechet_distance(statistics, statistics) < 1e-5 * np.trace(covariance)


def test_too_few_samples_warn():
    features = np.random.default_rng(6).standard_normal((8, 8))
    enough = Statistics(9, np.zeros(8), np.eye(8))
    with pytest.warns(UserWarning, match="8-dimensional features from 8 samples"):
        frechet_distance(Statistics.of(features), enough)


def test_moments_of_an_unknown_count_warn_of_our_own_samples_alone(recwarn):
    published = Statistics(None, np.zeros(8), np.eye(8))
    enough = Statistics(9, np.zeros(8), np.eye(8))
    assert frechet_distance(enough, published) < 1e-12 and not recwarn
    with pytest.warns(UserWarning, match="8-dimensional features from 8 samples: a covariance"):
        frechet_distance(Statistics(8, np.zeros(8), np.eye(8)), published)
    with pytest.raises(UserError, match="a count is unknown"):
        enough + published


def test_other_dimensions_are_refused():
    a, b = Statistics.of(np.eye(3)), Statistics.of(np.eye(4))
    with pytest.raises(UserError, match="3 dimensions against 4"):
        frechet_distance(a, b)
    with pytest.raises(UserError, match="3 dimensions against 4"):
        a + b


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.array([[1.0, np.nan], [0.0, 1.0]]), "1 of 2 samples"),
        (np.array([[1.0, np.inf], [np.nan, 1.0]]), "2 of 2 samples"),
    ],
)
def test_features_that_are_no_matrix_of_numbers_are_refused(features, message):
    with pytest.raises(UserError, match=message):
        Statistics.of(features)


@pytest.mark.parametrize(
    ("mean", "covariance", "count", "message"),
    [
        (np.zeros(3), np.eye(2), 5, r"mean \(3,\)"),
        (np.zeros((3, 1)), np.eye(3), 5, r"mean \(3, 1\)"),
        (np.full(2, np.nan), np.eye(2), 5, "not finite"),
        (np.zeros(2), np.eye(2), 0, "count is 0"),
    ],
)
def test_moments_that_do_not_fit_are_refused(mean, covariance, count, message):
    with pytest.raises(UserError, match=message):
        Statistics(count, mean, covariance)


def test_no_batches_are_refused():
    with pytest.raises(UserError, match="no batch"):
        gather([])
