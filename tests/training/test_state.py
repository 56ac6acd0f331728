"""The optimiser against PyTorch's and against Adam written out; keys and the average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY

from dmd_jax.config import load_config
from dmd_jax.distillation import optimizers_of
from dmd_jax.errors import UserError
from dmd_jax.method.randomness import Role, key_data, role_key
from dmd_jax.objectives.optimizers import AdamW, adamw, warmup
from dmd_jax.training.state import (
    apply_gradients,
    former_layout,
    of_former_layout,
    train_state,
    update_ema,
)

EVERY = 3  # a generator's updates, in steps
SETTINGS = AdamW(learning_rate=3e-3, warmup_steps=4, weight_decay=0.1, clip_norm=1.0)


def gradients_of(step):
    """Some gradients under the clip norm of 1 and some far over it."""
    rng = np.random.default_rng(step)
    scale = 0.05 if step % 2 else 5.0
    return {
        "a": (scale * rng.standard_normal((3, 4))).astype(np.float32),
        "b": (scale * rng.standard_normal(5)).astype(np.float32),
    }


def trained(steps, settings=SETTINGS, **options):
    rng = np.random.default_rng(99)
    params = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float32),
    }
    optimizer = adamw(settings, **options).transformation
    params_of = {"generator": jax.tree.map(jnp.asarray, params)}
    model = train_state(params_of, {"generator": optimizer}, seed=0).players["generator"]
    update = jax.jit(lambda model, gradients: apply_gradients(model, gradients, optimizer))
    for step in range(steps):
        model = update(model, gradients_of(step))
    return params, model.params


def test_adamw_equals_the_published_algorithm():
    """Loshchilov and Hutter's Algorithm 2 in float64, after clipping by the global norm."""
    params, found = trained(8)
    params = {name: leaf.astype(np.float64) for name, leaf in params.items()}
    mean = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    square = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    for step in range(8):
        gradients = gradients_of(step)
        norm = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in gradients.values()))
        rate = 3e-3 * min(1, step / 4)
        for name in params:
            gradient = gradients[name] * min(1, 1 / norm)
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.999 * square[name] + 0.001 * gradient**2
            step_size = mean[name] / (1 - 0.9 ** (step + 1))
            step_size /= np.sqrt(square[name] / (1 - 0.999 ** (step + 1))) + 1e-8
            params[name] -= rate * (step_size + 0.1 * params[name])
    for name in params:
        np.testing.assert_allclose(found[name], params[name], rtol=1e-6, atol=1e-7)


@pytest.mark.torch
def test_adamw_equals_pytorchs_with_diffusers_warmup():
    import torch
    from diffusers.optimization import get_constant_schedule_with_warmup

    params, found = trained(8)
    leaves = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.999))
    scheduler = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=4)
    for step in range(8):
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients_of(step)[name])
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        scheduler.step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found[name], leaf.detach().numpy(), rtol=2e-6, atol=1e-7)


def test_warmup_is_linear_from_zero():
    rate = warmup(2.0, 4)
    np.testing.assert_allclose([rate(k) for k in range(6)], [0, 0.5, 1, 1.5, 2, 2])
    assert warmup(2.0, 0)(0) == 2.0


def test_warmup_in_steps_rises_with_the_steps_between_updates():
    rate = warmup(2.0, 7, EVERY)
    np.testing.assert_allclose([rate(k) for k in range(4)], [0, 6 / 7, 12 / 7, 2], rtol=1e-6)
    assert warmup(2.0, 0, EVERY)(0) == 2.0


@pytest.mark.torch
def test_warmup_in_steps_equals_pytorchs_scheduler_that_steps_where_the_optimizer_does_not():
    import torch

    params, found = trained(8, dataclasses.replace(SETTINGS, warmup_counts="steps"), every=EVERY)
    leaves = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in params.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.999))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    for step in range(8 * EVERY):
        if step % EVERY == 0:
            for name, leaf in leaves.items():
                leaf.grad = torch.tensor(gradients_of(step // EVERY)[name])
            torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            optimizer.step()
        scheduler.step()
    other = trained(8)[1]
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found[name], leaf.detach().numpy(), rtol=2e-6, atol=1e-7)
        assert np.abs(found[name] - other[name]).max() > 1e-3


@pytest.mark.parametrize("counts, rates", [("steps", [0, 3 / 5, 1]), ("updates", [0, 0.2, 0.4])])
def test_the_config_says_what_the_generators_warmup_counts(counts, rates):
    """Also of an optimiser's state that came back from a checkpoint."""
    config = load_config(str(TINY), [])
    config.objective.generator_every = EVERY
    for each in config.optimizer.values():
        each.update(warmup_steps=5, warmup_counts=counts, weight_decay=0.0)
    params, optimizers = {"w": jnp.zeros((), jnp.float32)}, optimizers_of(config)
    assert sorted(optimizers) == ["fake_score", "generator"]
    for player, expected in (("generator", rates), ("fake_score", [0, 0.2, 0.4])):
        transformation, schedule = optimizers[player]
        rate = config.optimizer[player].learning_rate
        np.testing.assert_allclose([schedule(k) / rate for k in range(3)], expected, rtol=1e-6)
        model = train_state({"one": params}, {"one": transformation}, seed=0).players["one"]
        for k in range(3):
            model = jax.tree.map(jnp.asarray, jax.device_get(model))
            after = apply_gradients(model, {"w": jnp.ones((), jnp.float32)}, transformation)
            # Adam's update for a constant gradient of 1 is the learning rate.
            moved = model.params["w"] - after.params["w"]
            np.testing.assert_allclose(moved, expected[k] * rate, rtol=2e-5, atol=1e-12)
            model = after


def test_an_unknown_count_of_the_warmup_is_refused():
    message = "optimizer.fake_score.warmup_counts is 'epochs'; expected one of updates, steps"
    with pytest.raises(UserError, match=message):
        load_config(str(TINY), ["--config.optimizer.fake_score.warmup_counts=epochs"])


def test_average_follows_its_recurrence():
    ema, params = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}
    early = update_ema(ema, params, jnp.int32(0), 0.999)
    np.testing.assert_allclose(early["w"], [0.1 * 1 + 0.9 * 3, 0.1 * 2], rtol=1e-6)
    late = update_ema(ema, params, jnp.int32(100_000), 0.999)
    np.testing.assert_allclose(late["w"], [0.999 + 0.003, 0.999 * 2], rtol=1e-6)


def test_keys_differ_by_seed_step_and_role():
    keys = {
        tuple(np.asarray(jax.random.key_data(role_key(key_data(seed), step, role))))
        for seed in range(3)
        for step in range(3)
        for role in Role
    }
    assert len(keys) == 3 * 3 * len(Role)


def test_a_state_in_the_layout_without_players_is_the_state():
    """Of checkpoints that had two networks and the generator's average by name."""
    params = {"generator": {"w": jnp.arange(3.0)}, "fake_score": {"w": jnp.ones(2)}}
    optimizers = dict.fromkeys(params, adamw(SETTINGS).transformation)
    state = train_state(params, optimizers, averaged=["generator"], seed=4)
    former = former_layout(state)
    assert former.keys() == {"step", "generator", "fake_score", "ema", "key"}
    assert former["ema"] is state.players["generator"].ema
    found = of_former_layout(former, jax.eval_shape(lambda: state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = train_state(params, optimizers, seed=4)
    assert former_layout(plain)["ema"] is None
    assert of_former_layout(former_layout(plain), plain).players["generator"].ema is None
