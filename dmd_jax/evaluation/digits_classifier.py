"""A classifier of the real 8x8 digits, to judge whether samples show the digit asked for.

A support vector machine with an RBF kernel on the 64 pixels. Its accuracy on real digits that it
was not trained on is 0.9905 (10-fold cross-validation, 1,797 digits), as measured by

    python -c "from dmd_jax.evaluation import digits_classifier as d; print(d.held_out_accuracy())"

so that an agreement above about 0.99 says no more than one of 0.99.
"""

from __future__ import annotations

import functools

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

from dmd_jax.errors import UserError


def class_agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the classifier puts in the class asked for.

    Args:
      images: [N, 8, 8, 1] in [-1, 1]. labels: int [N], 0..9.

    Raises:
      UserError: the images are not 8x8 with one channel, or there is not one label for each.
    """
    images, labels = np.asarray(images, np.float64), np.asarray(labels)
    if images.shape[1:] != (8, 8, 1) or len(images) == 0:
        raise UserError(f"images: shape {images.shape}, the digits classifier takes (N, 8, 8, 1)")
    if labels.shape != (len(images),):
        raise UserError(f"labels: shape {labels.shape}, expected one for each of {len(images)}")
    return float(np.mean(_trained().predict(images.reshape(-1, 64)) == labels))


def held_out_accuracy(folds: int = 10) -> float:
    """Mean accuracy over stratified folds of the real digits, each judged by the other folds."""
    pixels, labels = _real_digits()
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(cross_val_score(_untrained(), pixels, labels, cv=split).mean())


@functools.cache
def _trained() -> SVC:
    return _untrained().fit(*_real_digits())


def _untrained() -> SVC:
    return SVC(C=10.0, gamma=0.05)


def _real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 64] in [-1, 1] (the set counts 0..16), labels [1797]."""
    digits = load_digits()
    return digits.data / 8.0 - 1.0, digits.target
