"""The judge of class agreement, on real digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dmd_jax.errors import UserError
from dmd_jax.evaluation.digits_classifier import class_agreement, held_out_accuracy


def real_digits():
    digits = load_digits()
    return digits.images[..., None].astype(np.float32) / 8 - 1, digits.target


def test_accuracy_on_digits_held_out_is_what_the_docstring_says():
    assert round(held_out_accuracy(), 4) == 0.9905


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
