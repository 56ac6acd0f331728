"""Callers in Python hear of batches without a key before a device sees them."""

import jax
import numpy as np
import pytest

from dmd_jax.errors import UserError
from dmd_jax.objectives import fake_score_loss, generator_loss

Z = np.zeros((2, 8, 8, 1), np.float32)


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
