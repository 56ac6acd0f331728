"""SongUNet, DhariwalUNet and Heun's sampler against the PyTorch reference.

songunet_ddpmpp_cond.npz and songunet_ncsnpp_uncond.npz hold networks as they are initialised:
what enters each residual sum and the output carries weights of 1e-6, so that these files show
the preconditioning and the sampler, and are all but blind to the network between.
dhariwal_adm_cond.npz has weights of ordinary size everywhere.
songunet_drawn_weights.npz is the same reference, in float64, with weights of ordinary size in
every layer. They are drawn per state-dict key, n = default_rng(crc32(key)).standard_normal(shape):
16 n for the Fourier frequencies, 0.1 n for other vectors plus 1 for norm weights, and
n / sqrt(prod(shape[1:])) for the rest.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edm_pickle import drawn
from once import once

from dmd_jax.convert.edm import network_from_init_kwargs, params_from_state_dict
from dmd_jax.method.samplers import heun, one_step
from dmd_jax.method.schedules import NoiseSchedule, edm_level
from dmd_jax.models import build_denoiser

TOLERANCE = 2e-5  # of the output's largest magnitude


def nhwc(images):
    return np.transpose(images, (0, 2, 3, 1))


def relative_error(actual, reference_nchw):
    reference = nhwc(reference_nchw)
    return np.abs(np.asarray(actual) - reference).max() / np.abs(reference).max()


def drawn_network(arrays):
    network = network_from_init_kwargs(json.loads(arrays["kwargs"].item()))
    shapes = {key: json.loads(shape) for key, shape in zip(arrays["keys"], arrays["shapes"])}
    taps = np.array(network["resample_filter"])
    resample = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    state_dict = {
        key: resample if key.endswith("resample_filter") else drawn(key, tuple(shape))
        for key, shape in shapes.items()
    }
    return network, params_from_state_dict(state_dict, network)


def stored_network(arrays):
    network = network_from_init_kwargs(json.loads(arrays["kwargs"].item()))
    state_dict = {k[len("param/") :]: v for k, v in arrays.items() if k.startswith("param/")}
    return network, params_from_state_dict(state_dict, network)


def variant_of(golden, variant):
    prefix = f"{variant}/"
    arrays = golden("songunet_drawn_weights")
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    "stem", ["songunet_ddpmpp_cond", "songunet_ncsnpp_uncond", "dhariwal_adm_cond"]
)
def test_stored_networks_and_samplers_match_reference(golden, stem):
    arrays = golden(stem)
    network, params = stored_network(arrays)
    traced = build_denoiser(network).denoise
    denoise = once(traced)
    cond = arrays["labels"].argmax(axis=-1).astype(np.int32) if "labels" in arrays else None
    z = nhwc(arrays["z"])

    denoised = denoise(params, nhwc(arrays["x"]), edm_level(arrays["sigma"]), cond)
    assert relative_error(denoised, arrays["denoised"]) < TOLERANCE
    image = one_step(denoise, params, z, cond, schedule=NoiseSchedule.edm())
    assert relative_error(image, arrays["one_step_sigma80"]) < TOLERANCE
    sampler = once(functools.partial(heun, traced, num_steps=18))
    assert relative_error(sampler(params, z, cond), arrays["heun18"]) < TOLERANCE


@pytest.mark.parametrize("variant", ["ddpmpp_cond", "ncsnpp_uncond", "skip_skip"])
def test_every_layer_matches_reference(golden, variant):
    arrays = variant_of(golden, variant)
    network, params = drawn_network(arrays)
    denoise = once(build_denoiser(network).denoise)
    cond = arrays.get("labels")
    denoised = denoise(params, nhwc(arrays["x"]), edm_level(arrays["sigma"]), cond)
    # Each example by itself: sigma = 0.01 is all skip connection, sigma = 80 all network.
    for ours, reference in zip(denoised, arrays["denoised"]):
        assert relative_error(ours[None], reference[None]) < TOLERANCE


def test_heun_matches_reference_where_the_network_matters(golden):
    arrays = variant_of(golden, "ddpmpp_cond")
    network, params = drawn_network(arrays)
    sampler = once(functools.partial(heun, build_denoiser(network).denoise, num_steps=6))
    images = sampler(params, nhwc(arrays["z"]), arrays["labels"])
    assert relative_error(images, arrays["heun6"]) < TOLERANCE


def test_bfloat16_keeps_float32_parameters_and_output(golden):
    arrays = variant_of(golden, "ddpmpp_cond")
    check_bfloat16(arrays, *drawn_network(arrays), arrays["labels"], tolerance=2e-2)


def test_bfloat16_of_dhariwal(golden):
    arrays = golden("dhariwal_adm_cond")
    cond = arrays["labels"].argmax(axis=-1)
    check_bfloat16(arrays, *stored_network(arrays), cond, tolerance=4e-2)


def check_bfloat16(arrays, network, params, cond, *, tolerance):
    denoiser = build_denoiser(network, dtype="bfloat16")
    level = edm_level(arrays["sigma"])
    denoised = once(denoiser.denoise)(params, nhwc(arrays["x"]), level, cond)
    assert denoised.dtype == jnp.float32
    for ours, reference in zip(denoised, arrays["denoised"]):
        assert relative_error(ours[None], reference[None]) < tolerance
    shapes = jax.tree.leaves(jax.eval_shape(denoiser.init, jax.random.key(0)))
    assert {leaf.dtype for leaf in shapes} == {jnp.dtype("float32")}
