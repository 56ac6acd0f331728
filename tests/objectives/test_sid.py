"""SiD's step written out by hand, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dmd_jax.errors import UserError
from dmd_jax.method import losses
from dmd_jax.method.consistency import karras_level
from dmd_jax.method.randomness import Role, role_key
from dmd_jax.method.schedules import NoiseSchedule, edm_level, forward_diffusion
from dmd_jax.objectives import draw_lognormal
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.objectives.sid import SiD, sid
from dmd_jax.training.train_step import initial_state, make_train_step

BATCH = 8
SHAPE = (BATCH, *small.SHAPE)
OPTIMIZER = adamw(AdamW(learning_rate=1e-3, warmup_steps=0, beta1=0.0))


def key(role):
    return role_key(jax.random.key_data(jax.random.key(7)), 0, role)


def test_a_step_is_the_one_written_out():
    """The fake score first, on samples of its own; the generator by the fake score's update."""
    made = small.build(sid, SiD(batch_size=BATCH, ema_decay=0.0), optimizer=OPTIMIZER)
    assert made.needs == {} and list(made.players) == ["fake_score", "generator"]
    network = small.init(jax.random.key(0))
    frozen = {"network": network}
    state = jax.jit(functools.partial(initial_state, made, seed=7))(frozen)
    after, metrics = jax.jit(make_train_step(made))(state, frozen, {})

    def samples(params, latents, labels):
        z = jax.random.normal(key(latents), SHAPE)
        cond = jax.random.randint(key(labels), (BATCH,), 0, small.CLASSES)
        return small.denoise(params, 2.5 * z, edm_level(jnp.full(BATCH, 2.5)), cond), cond

    def fake(params):
        x, cond = samples(network, Role.FAKE_LATENTS, Role.FAKE_LABELS)
        draws = draw_lognormal(key(Role.FAKE_SCORE), SHAPE)
        x_t = forward_diffusion(x, draws.noise, draws.level)
        denoised = small.denoise(params, x_t, draws.level, cond)
        return losses.denoising_loss(denoised, x, weight=losses.edm_weight(draws.level)).mean()

    def generator(params, fake_params):
        x, cond = samples(params, Role.LATENTS, Role.LABELS)
        level_key, noise_key = jax.random.split(key(Role.MATCHING))
        level = karras_level(1 - 0.8 * jax.random.uniform(level_key, (BATCH,)))
        x_t = forward_diffusion(x, jax.random.normal(noise_key, SHAPE), level)
        scores = [small.denoise(one, x_t, level, cond) for one in (network, fake_params)]
        return 100 * losses.sid_loss(x, *scores, a=1.2).mean()

    def updated(gradients):
        transformation = OPTIMIZER.transformation
        updates, _ = transformation.update(gradients, transformation.init(network), network)
        return jax.tree.map(jnp.add, network, updates)

    fake_loss, gradients = jax.value_and_grad(fake)(network)
    fake_params = updated(gradients)
    loss, gradients = jax.value_and_grad(generator)(network, fake_params)
    found = {name: player.params for name, player in after.players.items()}
    for name, expected in (("fake_score", fake_params), ("generator", updated(gradients))):
        for a, b in zip(*map(jax.tree.leaves, (found[name], expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)
    assert metrics["fake_score"]["loss_fake_score"] == pytest.approx(float(fake_loss), rel=1e-5)
    assert metrics["generator"]["loss_generator"] == pytest.approx(float(loss), rel=1e-4)


def test_levels_outside_the_schedule_and_other_schedules_are_refused():
    with pytest.raises(UserError, match=r"sigma_init=81; expected 0.002 to 80"):
        small.build(sid, SiD(batch_size=BATCH, sigma_init=81.0))
    family = small.teacher(NoiseSchedule.scaled_linear())
    with pytest.raises(UserError, match="SiD is for EDM's schedule"):
        small.build(sid, SiD(batch_size=BATCH), family=family)
