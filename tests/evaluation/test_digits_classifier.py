"""The judges of class agreement and of features, on real digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from dmd_jax.errors import UserError
from dmd_jax.evaluation.digits_classifier import class_agreement, features, held_out_accuracy
from dmd_jax.evaluation.frechet import Statistics, frechet_distance


def real_digits():
    digits = load_digits()
    return digits.images[..., None].astype(np.float32) / 8 - 1, digits.target


def test_accuracy_on_digits_held_out_is_what_the_docstring_says():
    assert round(held_out_accuracy("agreement", folds=10), 4) == 0.9905
    # A perceptron's training is thousands of sums whose order is the machine's; half a percent.
    assert held_out_accuracy("features", folds=3) == pytest.approx(0.9772, abs=0.005)


def test_real_digits_agree_with_their_own_labels_only():
    images, labels = real_digits()
    assert class_agreement(images, labels) == 1.0
    assert class_agreement(images, (labels + 1) % 10) == 0.0
    half = np.where(np.arange(len(labels)) < 900, labels, (labels + 5) % 10)
    assert class_agreement(images, half) == pytest.approx(900 / 1797)


def test_digits_survive_a_little_noise_and_pure_noise_is_chance():
    images, labels = real_digits()
    noise = np.random.default_rng(0).standard_normal(images.shape)
    assert class_agreement(images + 0.2 * noise, labels) > 0.98
    assert class_agreement(0.5 * noise, labels) < 0.25


def test_features_are_the_layer_that_the_class_is_read_from():
    """scikit-learn's own forward pass is what these hidden values must lead to."""
    images, labels = real_digits()
    found = features(images)
    assert found.shape == (1797, 64) and found.dtype == np.float64 and found.min() == 0.0
    perceptron = MLPClassifier((128, 64), batch_size=600, learning_rate_init=3e-3, random_state=0)
    perceptron.fit(images.reshape(-1, 64).astype(np.float64), labels)
    logits = found @ perceptron.coefs_[-1] + perceptron.intercepts_[-1]
    likelihoods = np.exp(logits - logits.max(axis=1, keepdims=True))
    likelihoods /= likelihoods.sum(axis=1, keepdims=True)
    expected = perceptron.predict_proba(images.reshape(-1, 64).astype(np.float64))
    np.testing.assert_allclose(likelihoods, expected, atol=1e-9)


def test_features_mind_blur_far_more_than_noise_and_pixels_do_not():
    """Why the ablation is judged in them too: half the digits against the other half, blurred."""
    images, _ = real_digits()
    images = images[np.random.default_rng(0).permutation(len(images))]
    first, second = images[:898], images[898:]
    noisy = first + 0.4 * np.random.default_rng(1).standard_normal(first.shape)
    padded = np.pad(first, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    blurred = (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + 2 * first) / 4

    def distance(images, extract):
        return frechet_distance(*(Statistics.of(extract(each)) for each in (images, second)))

    def flat(images):
        return images.reshape(len(images), -1)

    # 4.3 and 3.8 in pixels, which call the noise worse; 2.6 and 19.6 in the features.
    assert distance(noisy, flat) > distance(blurred, flat)
    assert distance(noisy, features) < distance(blurred, features) / 5


@pytest.mark.parametrize("images", [np.zeros((2, 28, 28, 1)), np.zeros((0, 8, 8, 1))])
def test_features_of_other_shapes_are_refused(images):
    with pytest.raises(UserError, match="the digits classifier takes"):
        features(images)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 28, 28, 1)), np.zeros(2, int), r"\(2, 28, 28, 1\)"),
        (np.zeros((2, 8, 8)), np.zeros(2, int), r"\(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 1)), np.zeros(0, int), r"\(0, 8, 8, 1\)"),
        (np.zeros((2, 8, 8, 1)), np.zeros(3, int), r"labels: shape \(3,\)"),
    ],
)
def test_other_shapes_are_refused(images, labels, message):
    with pytest.raises(UserError, match=message):
        class_agreement(images, labels)
