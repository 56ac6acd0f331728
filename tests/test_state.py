"""The optimiser against PyTorch's and against Adam written out; keys and the average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax.state import (
    Role,
    adamw,
    apply_gradients,
    key_data,
    model_state,
    role_key,
    update_ema,
    warmup,
)

SETTINGS = dict(learning_rate=3e-3, warmup_steps=4, weight_decay=0.1, clip_norm=1.0)


def gradients_of(step):
    """Some gradients under the clip norm of 1 and some far over it."""
    rng = np.random.default_rng(step)
    scale = 0.05 if step % 2 else 5.0
    return {
        "a": (scale * rng.standard_normal((3, 4))).astype(np.float32),
        "b": (scale * rng.standard_normal(5)).astype(np.float32),
    }


def trained(steps):
    rng = np.random.default_rng(99)
    params = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float32),
    }
    optimizer = adamw(**SETTINGS)
    model = model_state(jax.tree.map(jnp.asarray, params), optimizer)
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
