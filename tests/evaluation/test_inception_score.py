"""The Inception Score against its definition and its closed forms."""

import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.evaluation.inception_score import inception_score


def by_definition(logits, splits):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        divergence = (part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count", [40, 57])
def test_score_equals_its_definition_whatever_the_batches(count):
    logits = 3 * np.random.default_rng(0).standard_normal((count, 7))
    for ends in ([], [13], [1, 2, 30], range(1, count)):
        found = inception_score(np.split(logits, list(ends)), count)
        np.testing.assert_allclose(found, by_definition(logits, 10), rtol=1e-12)


def test_a_sure_classifier_with_equal_classes_scores_their_number():
    logits = 1000.0 * np.tile(np.eye(4), (5, 1))
    np.testing.assert_allclose(inception_score([logits], 20, splits=5), (4, 0), atol=1e-12)


def test_equal_answers_score_one():
    logits = np.tile([1.0, 2.0, -3.0], (30, 1))
    np.testing.assert_allclose(inception_score([logits], 30), (1, 0), atol=1e-12)


def test_fewer_samples_than_splits_are_a_split_each():
    assert inception_score([np.eye(3)], 3) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("logits", "count", "message"),
    [
        (np.zeros((5, 2)), 6, "of 5 samples, expected 6"),
        (np.zeros((5, 2)), 4, "more than the 4 samples"),
        (np.array([[np.nan, 1.0]]), 1, "not finite"),
        (np.zeros((0, 2)), 0, "of 0 samples, expected at least 1"),
    ],
)
def test_logits_that_are_not_these_are_refused(logits, count, message):
    with pytest.raises(UserError, match=message):
        inception_score([logits], count)
