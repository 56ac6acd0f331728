"""Callers in Python hear of wrong labels, latents, tokens and batches before a device sees them."""

import jax
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.generation import ImageMaker
from dmd_jax.objectives import fake_score_loss, generator_loss
from dmd_jax.weights import load_weights, packaged

Z = np.zeros((2, 8, 8, 1), np.float32)


@pytest.fixture(scope="module")
def maker():
    weights = load_weights(packaged("digits_teacher"))
    return ImageMaker(weights, sampler="one-step", batch_size=8)


@pytest.mark.parametrize("z, labels, message", [
    (Z, None, r"labels are None; expected integers \[2\] of the network's 10 classes"),
    (Z, np.array([0, 10]), "label 10; expected 0 to 9"),
    (Z, np.array([-1, 0]), "label -1; expected 0 to 9"),
    (Z, np.array([1]), r"labels are int64 of shape \(1,\); expected integers \[2\]"),
    (Z, np.array([0.0, 1.0]), "labels are float64"),
    (Z[..., 0], np.array([0, 1]), r"latents are float32 of shape \(2, 8, 8\); expected float"),
    (Z[:0], np.array([], int), r"latents are float32 of shape \(0, 8, 8, 1\)"),
    (Z.astype(int), np.array([0, 1]), "latents are int64"),
])  # fmt: skip
def test_makers_of_images(maker, z, labels, message):
    with pytest.raises(UserError, match=message):
        maker(z, labels)


@pytest.mark.parametrize("missing", ["z", "cond", "y_ref", "cond_ref"])
def test_a_batch_without_a_key_is_named(missing):
    batch = dict(z=Z, cond=None, z_ref=Z, y_ref=Z, cond_ref=None)
    del batch[missing]
    with pytest.raises(UserError, match=f"the batch has no '{missing}' but .*; expected "):
        generator_loss({}, None, batch, networks=None, teacher_params=None, fake_score_params=None)


@pytest.mark.parametrize("missing", ["x0", "cond"])
def test_a_batch_of_the_denoising_loss_without_a_key_is_named(missing):
    batch = dict(x0=jax.numpy.zeros((2, 2)), cond=None)
    del batch[missing]
    with pytest.raises(UserError, match=f"the batch has no '{missing}'"):
        fake_score_loss({}, None, batch, denoise=None)
