"""DMD2's GAN, SiD and consistency through whole networks against their authors' code.

The files of tests/golden store DhariwalUNets and what the reference code made of them in float32.
Tolerances are of each array's largest magnitude.
"""

import json

import jax
import numpy as np
import pytest
from once import once

from dmd_jax.convert.edm import network_from_init_kwargs, params_from_state_dict
from dmd_jax.method import consistency, losses
from dmd_jax.method.schedules import NoiseSchedule, edm_level, forward_diffusion
from dmd_jax.models import build_denoiser
from dmd_jax.models.heads import Head


def check(found, expected, tolerance):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture
def networks(golden):
    """stem -> (its arrays with NHWC images, denoiser, real params, fake params)."""

    def load(stem):
        arrays, weights = golden(stem), golden("dmd_losses_edm")
        assert arrays["kwargs"].item() == weights["kwargs"].item()
        network = network_from_init_kwargs(json.loads(arrays["kwargs"].item()))

        def params(role):
            found = {k.removeprefix(role): v for k, v in weights.items() if k.startswith(role)}
            return params_from_state_dict(found, network)

        images = {
            name: value.transpose(0, 2, 3, 1)
            if value.ndim == 4 and not name.endswith(("_grad", "grad_of_mean", "weight"))
            else value
            for name, value in arrays.items()
        }
        denoiser = build_denoiser(network)
        return images, denoiser, params("real/"), params("fake/")

    return load


def leaf(gradients, key):
    """The gradient of a convolution by its PyTorch name, in PyTorch's layout."""
    *path, _ = key.removeprefix("model.").replace("enc.", "enc_").split(".")
    for name in path:
        gradients = gradients[name]
    return gradients["kernel"].transpose(3, 2, 0, 1)


def head_params(arrays):
    def conv(index):
        kernel = arrays[f"head/{index}.weight"].astype(np.float32).transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": arrays[f"head/{index}.bias"].astype(np.float32)}

    def norm(index):
        return {
            "scale": arrays[f"head/{index}.weight"].astype(np.float32),
            "bias": arrays[f"head/{index}.bias"].astype(np.float32),
        }

    last = conv(6)
    return {
        "down0_conv": conv(0),
        "down0_norm": norm(1),
        "whole_conv": conv(3),
        "whole_norm": norm(4),
        "logit": last | {"kernel": last["kernel"][0, 0]},
    }


def test_gan_of_both_turns(networks):
    arrays, denoiser, _, fake = networks("dmd2_gan_edm")
    head, schedule = head_params(arrays), NoiseSchedule.edm()

    def seen(params, image, of):
        """(features, logits) of images at the levels and with the noise that the file has."""
        level = schedule.level(arrays[f"{of}_t"])
        x_t = forward_diffusion(image, arrays[f"{of}_noise"], level)
        which = "real" if of == "real" else "fake"
        cond = arrays[f"{which}_labels"].argmax(axis=-1)
        features = denoiser.features(params[0], x_t, level, cond)
        return features, Head().apply({"params": params[1]}, features)

    def generator_turn(image):
        return losses.gan_generator_loss(seen((fake, head), image, "gen")[1])

    def fake_turn(params):
        features, fake_logits = seen(params, arrays["fake_image"], "fake")
        _, real_logits = seen(params, arrays["real_image"], "real")
        return losses.gan_head_loss(real_logits, fake_logits), (features, real_logits, fake_logits)

    loss, gradient = jax.jit(jax.value_and_grad(generator_turn))(arrays["fake_image"])
    check(loss, arrays["gen_cls_loss"], 1e-5)
    # The head's last norm has two values in a group, so that its gradient is all but a sign's: for
    # one sample of these features PyTorch's own float32 differs from its float64 by 2e-4
    # to 3e-3, ours by 2e-4 at most. So the gradients through it have other bounds.
    check(gradient, arrays["gen_cls_loss_grad_wrt_image"], 1e-4)

    value = jax.jit(jax.value_and_grad(fake_turn, has_aux=True))((fake, head))
    (loss, (features, real_logits, fake_logits)), (of_network, of_head) = value
    check(loss, arrays["guidance_cls_loss"], 1e-5)
    check(features, arrays["bottleneck_fake"], 1e-5)
    check(jax.nn.sigmoid(real_logits), arrays["sigmoid_real"], 1e-5)
    check(jax.nn.sigmoid(fake_logits), arrays["sigmoid_fake"], 1e-5)
    check(leaf(of_network, arrays["guidance_grad_key"].item()), arrays["guidance_grad"], 1e-3)
    assert arrays["head_grad_key"].item() == "3.weight"
    check(of_head["whole_conv"]["kernel"].transpose(3, 2, 0, 1), arrays["head_grad"], 1e-3)
    # The decoder is not asked, so no gradient reaches it.
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(of_network["out_conv"]))


def test_sid(networks):
    arrays, denoiser, real, fake = networks("sid_edm")
    # Karras' curve, at most tmax of its 1000 parts from the least noise.
    position = 1 - arrays["u"].ravel() * arrays["tmax"].item() / 1000
    level = consistency.karras_level(position)
    check(level.sigma, arrays["sigma"].ravel(), 1e-5)
    level, cond = edm_level(arrays["sigma"].ravel()), arrays["labels"].argmax(axis=-1)

    @once
    def run(x, a):
        def loss(x):
            x_t = forward_diffusion(x, arrays["noise"], level)
            scores = [denoiser.denoise(params, x_t, level, cond) for params in (real, fake)]
            found = losses.sid_loss(x, *scores, a=a)
            return found.mean(), found

        return jax.value_and_grad(loss, has_aux=True)(x)

    values = sorted({float(key[5:].split("/")[0]) for key in arrays if key.startswith("alpha")})
    assert len(values) == 3
    for a in values:
        (_, found), gradient = run(arrays["x"], a)
        check(found, arrays[f"alpha{a}/loss"].sum(axis=(1, 2, 3)), 2e-5)
        check(gradient, arrays[f"alpha{a}/dsumloss_over_batch_dx"], 2e-5)


WEIGHTS = {
    "uniform": losses.uniform_weight,
    "karras": losses.edm_weight,
    "truncated-snr": losses.truncated_snr_weight,
}


@pytest.mark.parametrize("kind", ["cd18", "ct150", "pd8"])
def test_consistency_and_progressive_distillation(networks, kind):
    arrays, denoiser, teacher, student = networks("consistency_edm")
    mix = arrays["target_mix"].item()
    target_params = jax.tree.map(lambda a, b: mix * a + (1 - mix) * b, teacher, student)
    x0, cond = arrays["x0"], arrays["labels"].argmax(axis=-1)
    index, scales = arrays[f"{kind}/indices"], arrays[f"{kind}/num_scales"].item()
    consistent = consistency.consistency_function(denoiser.denoise)
    halves = 0 if kind == "pd8" else 1  # where the last level is at the end of the curve
    level = consistency.karras_level(index / (scales - halves))
    x_t = forward_diffusion(x0, arrays["noise"], level)

    def targets():
        if kind == "pd8":
            middle, end = (consistency.karras_level((index + by) / scales) for by in (0.5, 1))
            return consistency.two_step_target(
                denoiser.denoise, teacher, x_t, level, middle, end, cond
            )
        end = consistency.karras_level((index + 1) / (scales - 1))
        if kind == "ct150":
            nearer = consistency.euler_step(x_t, x0, level, end)
        else:
            nearer = consistency.heun_step(denoiser.denoise, teacher, x_t, level, end, cond)
        return consistent(target_params, nearer, end, cond)

    function = denoiser.denoise if kind == "pd8" else consistent

    @once
    def run(params):
        target = targets()

        def loss(last, metric, weight):
            of_student = function(params | {"out_conv": last}, x_t, level, cond)
            value = losses.consistency_loss(
                of_student, target, weight=WEIGHTS[weight](level), distance=metric
            )
            return value.mean(), value

        return {
            (metric, weight): jax.grad(loss, has_aux=True)(params["out_conv"], metric, weight)
            for metric in ("l1", "l2")
            for weight in WEIGHTS
        }

    assert arrays["grad_key"].item() == "model.out_conv.weight"
    for (metric, weight), (gradient, value) in run(student).items():
        check(value, arrays[f"{kind}/{metric}/{weight}/loss"], 2e-5)
        expected = arrays[f"{kind}/{metric}/{weight}/grad_of_mean"]
        check(gradient["kernel"].transpose(3, 2, 0, 1), expected, 2e-5)
