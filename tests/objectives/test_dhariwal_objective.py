"""Both objectives through whole networks against the authors' released EDM code.

dmd_losses_edm.npz stores two DhariwalUNets, samples x, bins and noise, and what the reference code
made of them in float32. Tolerances are of each array's largest magnitude.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.convert.edm import network_from_init_kwargs, params_from_state_dict
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import build_denoiser
from dmd_jax.objectives import Draws, Networks, fake_score_loss, generator_loss

TOLERANCE = 1e-4


def nhwc(images):
    return jnp.asarray(np.transpose(images, (0, 2, 3, 1)))


def check(actual, reference):
    actual, reference = np.asarray(actual), np.asarray(reference)
    assert actual.shape == reference.shape
    assert np.abs(actual - reference).max() < TOLERANCE * np.abs(reference).max()


@pytest.fixture
def reference(golden):
    """(arrays, denoise, real params, fake params); images are NHWC."""
    arrays = golden("dmd_losses_edm")
    network = network_from_init_kwargs(json.loads(arrays["kwargs"].item()))

    def params(role):
        found = {k.removeprefix(role): v for k, v in arrays.items() if k.startswith(role)}
        return params_from_state_dict(found, network)

    images = {
        name: nhwc(value) if value.ndim == 4 and name != "fake_grad" else value
        for name, value in arrays.items()
        if "/" not in name
    }
    return images, build_denoiser(network).denoise, params("real/"), params("fake/")


def draws(arrays, role):
    return Draws(NoiseSchedule.edm().level(arrays[f"{role}_t"]), arrays[f"{role}_noise"])


def test_matching_from_weights_noise_and_bins(reference):
    arrays, denoise, real, fake = reference
    cond = arrays["labels"].argmax(axis=-1)
    # The generator's "parameters" are its images, so that their gradient is d loss / d x.
    networks = Networks(lambda x, z, cond: x, denoise, denoise)

    @jax.jit
    def run(x):
        def loss_fn(x):
            return generator_loss(
                x,
                draws(arrays, "dm"),
                {"z": None, "cond": cond},
                networks=networks,
                teacher_params=real,
                fake_score_params=fake,
                regression_weight=0.0,
            )

        return jax.value_and_grad(loss_fn, has_aux=True)(x)

    (loss, aux), gradient = run(arrays["x"])
    check(aux["pictures"]["denoised_real"], arrays["dm_pred_real"])
    check(aux["pictures"]["denoised_fake"], arrays["dm_pred_fake"])
    check(aux["pictures"]["gradient"], arrays["dm_grad"])
    check(loss, arrays["dm_loss"])
    check(gradient, arrays["dm_loss_grad_wrt_x"])


def test_fake_score_from_weights_noise_and_bins(reference):
    arrays, denoise, _, fake = reference
    fake_draws, cond = draws(arrays, "fake"), arrays["labels"].argmax(axis=-1)
    batch = {"x0": arrays["x"], "cond": cond}
    predictions = []

    @jax.jit
    def run(params):
        def loss_fn(params):
            def noted(*args):
                predictions.append(denoise(*args))
                return predictions[-1]

            loss = fake_score_loss(params, fake_draws, batch, denoise=noted)
            return loss, predictions.pop()

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, prediction), gradient = run(fake)
    check(prediction, arrays["fake_pred"])
    check(loss, arrays["fake_loss"])
    assert arrays["fake_grad_key"].item() == "model.out_conv.weight"
    check(gradient["out_conv"]["kernel"].transpose(3, 2, 0, 1), arrays["fake_grad"])
