"""Two classifiers of the real 8x8 digits, to judge samples by.

`class_agreement` asks whether samples show the digit asked for: a support vector machine with an
RBF kernel on the 64 pixels. `features` are what a Fréchet distance can be measured in where pixels
say too little, as Inception's are for photographs: the last hidden layer of a small perceptron.
Their accuracy on real digits that they were not trained on is 0.9905 (10-fold cross-validation,
1,797 digits) and 0.9772 (3-fold), as measured by

    python -c "from dmd_jax.evaluation import digits_classifier as d
    print(d.held_out_accuracy('agreement', 10), d.held_out_accuracy('features', 3))"

so that an agreement above about 0.99 says no more than one of 0.99.
"""

from __future__ import annotations

import functools

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from dmd_jax.errors import UserError


def class_agreement(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that the classifier puts in the class asked for.

    Args:
      images: [N, 8, 8, 1] in [-1, 1]. labels: int [N], 0..9.

    Raises:
      UserError: the images are not 8x8 with one channel, or there is not one label for each.
    """
    pixels, labels = _flat(images), np.asarray(labels)
    if labels.shape != (len(pixels),):
        raise UserError(f"labels: shape {labels.shape}, expected one for each of {len(pixels)}")
    return float(np.mean(_trained("agreement").predict(pixels) == labels))


def features(images: np.ndarray) -> np.ndarray:
    """The perceptron's last hidden layer, for `--features` of `dmd-jax evaluate`.

    Args:
      images: [N, 8, 8, 1] in [-1, 1].

    Returns:
      float64 [N, 64], at least zero. Trained on all real digits, from one fixed seed.

    Raises:
      UserError: the images are not 8x8 with one channel.
    """
    perceptron = _trained("features")
    hidden = _flat(images)
    for weights, bias in list(zip(perceptron.coefs_, perceptron.intercepts_, strict=True))[:-1]:
        hidden = np.maximum(hidden @ weights + bias, 0.0)
    return hidden


def held_out_accuracy(classifier: str, folds: int) -> float:
    """Mean accuracy over stratified folds of the real digits, each judged by the other folds.

    Args:
      classifier: "agreement" or "features", what it is used for.
    """
    pixels, labels = _real_digits()
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(cross_val_score(_untrained(classifier), pixels, labels, cv=split).mean())


@functools.cache
def _trained(classifier: str) -> SVC | MLPClassifier:
    return _untrained(classifier).fit(*_real_digits())


def _untrained(classifier: str) -> SVC | MLPClassifier:
    if classifier == "agreement":
        return SVC(C=10.0, gamma=0.05)
    return MLPClassifier((128, 64), batch_size=600, learning_rate_init=3e-3, random_state=0)


def _flat(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, np.float64)
    if images.shape[1:] != (8, 8, 1) or len(images) == 0:
        raise UserError(f"images: shape {images.shape}, the digits classifier takes (N, 8, 8, 1)")
    return images.reshape(len(images), -1)


def _real_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 64] in [-1, 1] (the set counts 0..16), labels [1797]."""
    digits = load_digits()
    return digits.data / 8.0 - 1.0, digits.target
