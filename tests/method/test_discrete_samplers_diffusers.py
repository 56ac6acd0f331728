"""Samplers for discrete timesteps against diffusers' schedulers, with the same networks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_discrete_samplers import SAMPLERS, SCHEDULE, normal

from dmd_jax.errors import UserError
from dmd_jax.method.discrete_samplers import SPACINGS, _timesteps
from dmd_jax.models import build_denoiser, build_network, discrete_denoiser, guided

# The schedulers' own code reads torch tensors in a way that NumPy is about to give up.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:__array__ implementation")]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def peer(name, spacing, final_alpha_one, prediction_type="epsilon", offset=1):
    import diffusers

    options = BETAS | {"timestep_spacing": spacing, "steps_offset": offset}
    options["prediction_type"] = prediction_type
    if name == "ddim":
        return diffusers.DDIMScheduler(
            **options, clip_sample=False, set_alpha_to_one=final_alpha_one
        )
    if name == "pndm":
        return diffusers.PNDMScheduler(
            **options, skip_prk_steps=True, set_alpha_to_one=final_alpha_one
        )
    options["final_sigmas_type"] = "zero" if final_alpha_one else "sigma_min"
    if name == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**options)
    return diffusers.UniPCMultistepScheduler(**options)


def raw_network(np_, weights, x, time, cond):
    """Not linear in x, and another function at each time and condition."""
    first, second = weights
    hidden = np_.tanh(x @ first + np_.sin(time / 200)[:, None] + cond)
    return hidden @ second / 2 + 0.8 * np_.sin(time / 300)[:, None] * x


# name, spacing, steps, guidance, the network's prediction, final_alpha_one
CASES = [
    *[
        (n, "leading", k, g, "epsilon", n in ("dpm++", "unipc"))
        for n in SAMPLERS
        for k in (4, 25, 50)
        for g in (1.0, 7.5)
    ],
    *[(n, "trailing", 30, 7.5, "v_prediction", n in ("ddim", "pndm")) for n in SAMPLERS],
    *[(n, "linspace", 30, 1.0, "epsilon", False) for n in SAMPLERS],
    *[(n, "trailing", 25, 1.0, "sample", True) for n in SAMPLERS],
    *[("dpm++", "linspace", n, 1.0, "v_prediction", False) for n in (14, 15)],
    ("pndm", "leading", 2, 1.0, "epsilon", False),
    ("unipc", "linspace", 3, 1.0, "epsilon", False),
]


@pytest.mark.parametrize("name, spacing, num_steps, guidance, prediction_type, one", CASES)
def test_equals_diffusers(name, spacing, num_steps, guidance, prediction_type, one):
    import torch

    weights, z, cond, uncond = normal(2, 6, 6) / 6**0.5, *normal(3, 4, 6)
    arrays = jax.tree.map(jnp.float32, (weights, z, cond, uncond))

    denoise = guided(
        discrete_denoiser(
            lambda params, x, time, cond: raw_network(jnp, params, x, time, cond),
            prediction_type=prediction_type,
        ),
        guidance,
    )

    @jax.jit
    def ours(weights, z, cond, uncond):
        return SAMPLERS[name](
            denoise,
            weights,
            z,
            (cond, uncond),
            schedule=SCHEDULE,
            num_steps=num_steps,
            timestep_spacing=spacing,
            final_alpha_one=one,
        )

    # diffusers' PNDM extrapolates v where the network predicts v, and knows no x0; the published
    # method extrapolates the noise, so the noise is what it is given.
    gives_noise = name == "pndm"
    scheduler = peer(name, spacing, one, "epsilon" if gives_noise else prediction_type)
    scheduler.set_timesteps(num_steps)
    weights, x, cond, uncond = (torch.tensor(np.float32(v)) for v in (weights, z, cond, uncond))
    for t in scheduler.timesteps:
        time = t.float().expand(len(x))
        raw = raw_network(torch, weights, x, time, cond)
        without = raw_network(torch, weights, x, time, uncond)
        raw = without + guidance * (raw - without)
        if gives_noise:
            raw = noise_of(raw, x, scheduler.alphas_cumprod[t], prediction_type)
        x = scheduler.step(raw, t, x).prev_sample

    error = np.abs(ours(*arrays) - x.numpy()).max() / x.abs().max().item()
    # Both round to float32 in every step, and diffusers' table of alphas too.
    assert error < 1e-5


@pytest.fixture
def one_torch_thread():
    """More of them wait for each other, over so little to do."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def small_unets():
    """One U-Net: its denoiser, compiled alone, its parameters, and it in PyTorch."""
    import diffusers
    from torch_weights import draw_parameters, params_of

    options = {
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
    }
    network = {"name": "unet2d_condition"} | options
    peer = draw_parameters(diffusers.UNet2DConditionModel(**options))
    params = params_of(peer, build_network(network))
    compiled = jax.jit(build_denoiser(network).denoise)

    def denoise(*arguments):
        with jax.disable_jit(False):
            return compiled(*arguments)

    return denoise, params, peer


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_diffusers_with_a_unet(name, guidance, one_torch_thread):
    import torch

    denoise, params, unet = small_unets()
    one = name in ("dpm++", "unipc")
    batch_size = 2 if guidance == 1 else 1  # one program then serves both
    z = normal(batch_size, 4, 4, 4).astype(np.float32)
    cond, uncond = normal(2, batch_size, 3, 6).astype(np.float32)
    for num_steps in (4, 25, 50):
        with jax.disable_jit():  # the scan is a loop around the compiled network
            x0 = SAMPLERS[name](
                guided(denoise, guidance),
                params,
                z,
                (jnp.asarray(cond), jnp.asarray(uncond)),
                schedule=SCHEDULE,
                num_steps=num_steps,
            )
        scheduler = peer(name, "leading", one)
        scheduler.set_timesteps(num_steps)
        x = torch.from_numpy(z.transpose(0, 3, 1, 2))
        with torch.no_grad():
            for t in scheduler.timesteps:
                raw = unet(x, t, torch.from_numpy(cond)).sample
                if guidance != 1:
                    without = unet(x, t, torch.from_numpy(uncond)).sample
                    raw = without + guidance * (raw - without)
                x = scheduler.step(raw, t, x).prev_sample
        expected = x.numpy().transpose(0, 2, 3, 1)
        error = np.abs(x0 - expected).max() / np.abs(expected).max()
        assert error < 1e-5


def noise_of(raw, x, alpha_bar, prediction_type):
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "v_prediction":
        return alpha * raw + sigma * x
    return (x - alpha * raw) / sigma if prediction_type == "sample" else raw


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name, offset", [("ddim", 1), ("dpm++", 1), ("pndm", 0), ("unipc", 0)])
def test_timesteps_are_those_of_diffusers(name, offset, spacing):
    scheduler = peer(name, spacing, True, offset=offset)
    for n in [*range(1, 60), *range(60, 999, 13), 999, 1000]:
        scheduler.set_timesteps(n)
        expected = scheduler.timesteps.numpy()
        if name == "pndm" and n > 1:
            assert expected[1] == expected[2]
            expected = np.delete(expected, 1)
        # For some n, rounding in its arange gives diffusers one timestep more, which is -1.
        assert np.all(expected[n:] == -1)
        expected = expected[:n]
        points = n + (name in ("dpm++", "unipc"))
        if expected[0] < 1000 and np.all(np.diff(expected) < 0):
            actual = _timesteps(SCHEDULE, n, spacing, offset, points=points)
            np.testing.assert_array_equal(actual, expected)
        else:
            with pytest.raises(UserError, match="different ones"):
                _timesteps(SCHEDULE, n, spacing, offset, points=points)
