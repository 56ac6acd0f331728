"""The peer's training step is ours: losses, gradients and updates, from the same random numbers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from parity import drawn_weights, draws_of, edm_config, in_torch, text_config

from dmd_jax.parallel.sharding import make_mesh
from dmd_jax.performance.benchmark import own_step

pytestmark = pytest.mark.torch

# Relative, of losses and of gradients' norms; both sides are float32, and later steps have the
# updates' differences in them. The matching loss is of the difference of two predictions that are
# nearly equal at first, so that it has an absolute one too, 1e-6.
TOLERANCE = 2e-5
# Of a tree of averaged gradients, ‖ours − theirs‖ / ‖ours‖.
MOMENT_TOLERANCE = 2e-5
# Likewise of updates. Adam's first are the gradients' signs, which rounding decides where a
# gradient is nothing but rounding, as that of the keys' biases.
UPDATE_TOLERANCE = 3e-3


@pytest.fixture
def both(monkeypatch):
    """Our step and its peer, with the same drawn weights and the same batch."""
    import torch
    from torch_peer.step import TorchStep

    monkeypatch.setattr(own_step, "random_weights", drawn_weights)

    def make(config):
        own = own_step.OwnStep(config, make_mesh(devices=jax.devices()[:1]))
        own.prepare()
        params, batch = own.on_host()
        peer = TorchStep(config, params, device=torch.device("cpu"))
        rows = peer.to_device(batch)
        key = jax.device_get(own.state.key)
        return own, peer, lambda step: peer(rows, draws_of(config, key, step))

    return make


def distance(ours, theirs) -> float:
    """‖ours − theirs‖ / ‖ours‖ over all arrays of two dicts."""
    assert ours.keys() == theirs.keys()
    squares = [
        [np.sum(np.square(array - theirs[key])), np.sum(np.square(array))]
        for key, array in ours.items()
    ]
    different, whole = np.sum(squares, axis=0)
    assert whole > 0
    return float(np.sqrt(different / whole))


def weights(peer, role):
    named = peer.trained[role].network.named_parameters()
    return {key: value.detach().numpy().copy() for key, value in named}


def check_step(own, peer, advance, step):
    """Both take a step; what they report and what they have then agree."""
    roles = ("generator", "fake_score")
    before = {role: in_torch(own.state.players[role].params) for role in roles}
    before_peer = {role: weights(peer, role) for role in roles}
    metrics, found = jax.device_get(own()), advance(step)
    for name, value in found.items():
        np.testing.assert_allclose(
            float(value), metrics[name], rtol=TOLERANCE, atol=1e-6, err_msg=name
        )
    for role in roles:
        if f"grad_norm_{role}" not in found:
            continue
        state = own.state.players[role]
        (adam,) = (
            part for part in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(part)
        )
        module, optimizer = peer.trained[role].network, peer.optimizers[role]
        moments = {
            key: optimizer.state[value]["exp_avg"].numpy()
            for key, value in module.named_parameters()
        }
        assert distance(in_torch(adam.mu), moments) < MOMENT_TOLERANCE
        ours, theirs = in_torch(state.params), weights(peer, role)
        updates = {key: ours[key] - before[role][key] for key in ours}
        peers_updates = {key: theirs[key] - before_peer[role][key] for key in theirs}
        assert distance(updates, peers_updates) < UPDATE_TOLERANCE
    return found


def is_adam(part) -> bool:
    return hasattr(part, "mu")


def test_step_of_images_with_labels(both):
    config = edm_config(accumulation=2, objective={"generator_every": 2, "ema_decay": 0.9})
    own, peer, advance = both(config)
    names = [set(check_step(own, peer, advance, step)) for step in range(3)]
    fake_alone = {"loss_fake_score", "grad_norm_fake_score"}
    assert names[1] == fake_alone
    assert (
        names[0]
        == names[2]
        == fake_alone
        | {
            "loss_matching",
            "loss_regression",
            "loss_generator",
            "grad_norm_generator",
        }
    )
    averages = {key: value.numpy() for key, value in peer.ema.network.named_parameters()}
    generator = own.state.players["generator"]
    assert distance(in_torch(generator.ema), averages) < 1e-6
    assert distance(in_torch(generator.ema), in_torch(generator.params)) > 1e-5


def test_the_generators_warmup_in_steps(both):
    warmup = {"warmup_counts": "steps", "warmup_steps": 8}
    config = edm_config(
        objective={"generator_every": 2}, optimizer={"generator": warmup, "fake_score": warmup}
    )
    own, peer, advance = both(config)
    for step in range(3):  # of which the third is the generator's second update
        metrics = jax.device_get(own())
        rates = {name: peer.optimizers[name].param_groups[0]["lr"] for name in peer.optimizers}
        advance(step)
    assert metrics["learning_rate_generator"] == pytest.approx(rates["generator"], rel=1e-6)
    assert rates["generator"] == rates["fake_score"] == pytest.approx(2 / 8 * 1e-4, rel=1e-12)


def test_step_of_text_with_guidance_lpips_and_the_pairs_in_the_matching_loss(both):
    config = text_config()
    assert config.objective.match_reference and config.objective.distance == "lpips"
    assert config.teacher.guidance == 3
    own, peer, advance = both(config)
    for step in range(2):
        found = check_step(own, peer, advance, step)
    # Guidance tells the teacher from its copies from the first step on.
    assert found["loss_matching"] > 0


def test_options_of_the_step_change_it():
    """Each option that the peer reads is one that its losses depend on."""
    import torch
    from torch_peer.losses import matching_gradient

    x, real, fake = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    level = (torch.tensor([0.5, 0.9]), torch.tensor([0.8, 0.4]), torch.zeros(2))
    from dmd_jax.method.losses import distribution_matching_gradient
    from dmd_jax.method.schedules import NoiseLevel

    for weighting, factor in (
        ("normalized", False),
        ("normalized", True),
        ("sigma_over_alpha", False),
        ("sigma3_over_alpha", False),
    ):
        config = edm_config(objective={"weighting": weighting, "alpha_factor": factor})
        found = matching_gradient(x, real, fake, level, config)
        expected, _ = distribution_matching_gradient(
            *(tensor.numpy() for tensor in (x, real, fake)),
            level=NoiseLevel(*(tensor.numpy() for tensor in level)),
            weighting=weighting,
            alpha_factor=factor,
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
