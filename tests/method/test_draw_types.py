"""Every draw says its type: with 64-bit types on, a seed gives the same float32 and int32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from diffusers_folder import TAESD, TEXT, UNET, VAE

from dmd_jax.method.randomness import Role, key_data, role_key
from dmd_jax.method.samplers import heun
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models import abstract_params, build_denoiser
from dmd_jax.objectives import draw, draw_lognormal
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.sampling.draws import draw_labels, draw_latents
from dmd_jax.training.train_step import initial_state, make_train_step

EDM = dict(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, channel_mult=(1,))
EDM |= dict(num_blocks=1, attn_resolutions=(8,), augment_dim=9)
VISION = dict(image_size=4, patch_size=2, hidden_size=8, intermediate_size=16, projection_dim=8)
VISION |= dict(num_hidden_layers=1, num_attention_heads=2)
NETWORKS = [
    {"name": "songunet", "model_channels": 8, **EDM},
    {"name": "dhariwal", "model_channels": 64, **EDM},
    {"name": "mlp", "dim": 2},
    {"name": "unet2d_condition", **UNET},
    {"name": "unet2d_condition", **UNET, "use_linear_projection": True},
    {"name": "autoencoder_kl", **VAE},
    {"name": "autoencoder_tiny", **TAESD},
    {"name": "clip_text", **TEXT},
    {"name": "clip_vision", **VISION},
]


def key(role):
    return role_key(key_data(3), 5, role)


def denoise(params, x_t, level, cond):
    return x_t / 2


def images():
    z = jnp.ones((2, 3), jnp.float32)
    return heun(denoise, None, z, None, num_steps=3, s_churn=2.0, key=key(Role.SAMPLER_NOISE))


def step():
    """The fake score after a step, whose latents, labels, levels and noise are all drawn."""
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, jnp.float32), SMALL)
    optimizer = adamw(AdamW(learning_rate=1e-3, warmup_steps=0))
    objective = small.objective(batch_size=4, optimizer=optimizer)
    state = initial_state(objective, {"network": params}, seed=3)
    train_step = jax.jit(make_train_step(objective))
    state, _ = train_step(state, {"network": params}, {"pairs": small.pairs_batch(0, 4)})
    return state.players["fake_score"].opt_state[1][0].mu


SMALL = jax.eval_shape(small.init, jax.random.key(0))
DRAWS = {
    "latents": lambda: draw_latents(3, 0, 4, (2, 2)),
    "labels": lambda: draw_labels(3, 0, 4, 10),
    "draw": lambda: draw(key(Role.MATCHING), (4, 3), schedule=NoiseSchedule.edm()),
    "draw_lognormal": lambda: draw_lognormal(key(Role.TEACHER), (4, 3)),
    "heun with noise": images,
    "songunet": lambda: build_denoiser(NETWORKS[0]).init(key(Role.INIT)),
    "step": step,
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_same_bits_with_64_bit_types(name):
    expected = jax.tree.leaves(jax.device_get(DRAWS[name]()))
    with jax.enable_x64(True):
        assert jax.random.normal(key(Role.INIT)).dtype == jnp.float64
        found = jax.tree.leaves(jax.device_get(DRAWS[name]()))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.dtype in (np.float32, np.int32)
        if name in ("step", "draw_lognormal"):  # what is computed of them may round otherwise
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network["name"])
def test_parameters_are_float32_with_64_bit_types(network):
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(abstract_params(network))
    assert len(leaves) > 2 and {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
