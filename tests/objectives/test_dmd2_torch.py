"""DMD2's two turns on a UNet of Stable Diffusion's, against the same in diffusers and PyTorch."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_folder import PARTS, state_dict

from dmd_jax.convert.torch_layout import from_torch, to_torch, torch_key
from dmd_jax.method.losses import snr_weight
from dmd_jax.method.randomness import role_key
from dmd_jax.method.schedules import few_step_indices
from dmd_jax.models import abstract_params, build_denoiser, guided
from dmd_jax.objectives import Networks, View
from dmd_jax.objectives.dmd2 import DMD2, dmd2
from dmd_jax.objectives.optimizers import AdamW, adamw
from dmd_jax.teachers.teacher import Teacher
from dmd_jax.training.train_step import initial_state

pytestmark = pytest.mark.torch

NETWORK = PARTS["unet"][0]
BATCH, GUIDANCE, STEPS, STEP = 3, 1.75, 4, 2
GAN, GAN_FAKE = 0.1, 0.3
TOLERANCE = 1e-4  # of losses and, relative to the largest magnitude, of gradients
# Of the generator, the fake score and the head: PyTorch's names.
NAMED = {
    "generator": ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"),
    "fake_score": (
        "conv_in.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "conv_out.weight",
    ),
}


def near(params, seed):
    """Other parameters, a little off."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + (0.02 * rng.standard_normal(leaf.shape)).astype(np.float32), params
    )


@pytest.fixture(scope="module")
def ours():
    """(objective, frozen, players' parameters, rows)."""
    denoiser, arrays = build_denoiser(NETWORK), state_dict(NETWORK)
    paths = flax.traverse_util.flatten_dict(abstract_params(NETWORK), sep="/")
    flat = {path: from_torch(path, arrays[torch_key(path)]) for path in paths}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    rng = np.random.default_rng(0)
    cond, real_cond = rng.standard_normal((2, BATCH, *denoiser.cond_shape)).astype(np.float32)
    null = rng.standard_normal((1, *denoiser.cond_shape)).astype(np.float32)
    frozen = {"network": params, "null": null}
    teacher = Teacher(
        denoise=denoiser.denoise,
        schedule=denoiser.schedule,
        features=denoiser.features,
        sample_shape=denoiser.sample_shape,
        tokens={},
        encode=None,
        null=lambda frozen: frozen["null"],
        decode=None,
        draw_tokens=None,
        takes="text",
    )
    guide = guided(denoiser.denoise, GUIDANCE)
    networks = Networks(
        generate=None,
        teacher=lambda f, x_t, level, cond: guide(f["network"], x_t, level, (cond, f["null"])),
        fake_score=denoiser.denoise,
    )
    starts = {"generator": near(params, 1), "fake_score": near(params, 2)}
    made = dmd2(
        DMD2(batch_size=BATCH, num_steps=STEPS, gan_weight=GAN, gan_fake_weight=GAN_FAKE),
        teacher,
        networks,
        init=dict.fromkeys(starts, lambda frozen, key: frozen["network"]),
        optimizers=dict.fromkeys(starts, adamw(AdamW())),
        fake_weight=snr_weight,
        preview_key=jax.random.key(0),
    )
    players = {
        name: player.params
        for name, player in initial_state(made, frozen, starts, seed=0).players.items()
    }
    base = jax.random.key_data(jax.random.key(3))
    x0 = rng.standard_normal((BATCH, *denoiser.sample_shape)).astype(np.float32)
    batch = {"prompts": {"cond": cond}, "images": {"x0": x0, "cond": real_cond}}
    rows = made.rows(functools.partial(role_key, base, 0), frozen, batch)
    return made, frozen, players, rows | {"step": jnp.int32(STEP)}


class Peer:
    """The method as one writes it with diffusers."""

    def __init__(self, frozen, players, rows):
        import torch
        from torch_peer.networks import build_torch, load_params

        def network(params):
            return load_params(build_torch(NETWORK), jax.device_get(params))

        self.torch = torch
        self.teacher = network(frozen["network"])
        self.generator = network(players["generator"])
        self.fake_score = network(players["fake_score"]["network"])
        self.head = self._head(jax.device_get(players["fake_score"]["head"]))
        self.null = torch.tensor(np.asarray(frozen["null"]))
        self.rows = jax.device_get(rows)
        schedule = build_denoiser(NETWORK).schedule
        self.schedule = [
            torch.tensor(np.asarray(part)) for part in schedule.level(jnp.arange(1000))
        ]

    def _head(self, params):
        """A convolution over all of the 4x4 features, GroupNorm, SiLU and a linear layer."""
        nn, torch = self.torch.nn, self.torch
        channels = params["whole_conv"]["bias"].shape[0]
        head = nn.Sequential(
            nn.Conv2d(channels, channels, 4),
            nn.GroupNorm(4, channels, eps=1e-5),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(channels, 1),
        )
        values = (
            params["whole_conv"]["kernel"].transpose(3, 2, 0, 1),
            params["whole_conv"]["bias"],
            params["whole_norm"]["scale"],
            params["whole_norm"]["bias"],
            params["logit"]["kernel"].T,
            params["logit"]["bias"],
        )
        for parameter, value in zip(head.parameters(), values, strict=True):
            parameter.data = torch.tensor(np.array(value))
        return head

    def image(self, name, *keys):
        value = self.rows[name]
        for key in keys:
            value = value[key] if isinstance(value, dict) else value[:, key]
        return self.torch.tensor(np.asarray(value)).permute(0, 3, 1, 2)

    def draws(self, name):
        """(alpha, sigma, time [B, 1, 1, 1], noise) of a role."""
        level, noise = self.rows[name].level, self.rows[name].noise
        shaped = [self.torch.tensor(np.asarray(part))[:, None, None, None] for part in level]
        return *shaped, self.torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2)

    def cond(self, name="cond"):
        return self.torch.tensor(np.asarray(self.rows[name]))

    def denoise(self, network, x_t, alpha, sigma, time, cond):
        raw = network(x_t, time.reshape(-1), cond).sample
        return (x_t - sigma * raw) / alpha

    def generate(self):
        """The step that learns, on what the earlier ones lead to without a gradient."""
        indices = few_step_indices(1000, STEPS)
        levels = [
            [part[index] * self.torch.ones(BATCH, 1, 1, 1) for part in self.schedule]
            for index in indices
        ]
        x_t = self.image("z")
        with self.torch.no_grad():
            for step in range(STEP):
                x0 = self.denoise(self.generator, x_t, *levels[step], self.cond())
                alpha, sigma, _ = levels[step + 1]
                x_t = alpha * x0 + sigma * self.image("step_noise", step)
        return self.denoise(self.generator, x_t, *levels[STEP], self.cond())

    def logits(self, x, name, cond):
        """The head on the middle block's output of the fake score."""
        alpha, sigma, time, noise = self.draws(name)
        seen = []
        hook = self.fake_score.mid_block.register_forward_hook(lambda *args: seen.append(args[2]))
        self.fake_score(alpha * x + sigma * noise, time.reshape(-1), cond)
        hook.remove()
        return self.head(seen[0])

    def generator_turn(self):
        functional = self.torch.nn.functional
        x = self.generate()
        alpha, sigma, time, noise = self.draws("matching")
        with self.torch.no_grad():
            x_t = alpha * x + sigma * noise
            level = alpha, sigma, time
            uncond = self.null.expand(BATCH, -1, -1)
            without = self.denoise(self.teacher, x_t, *level, uncond)
            real = without + GUIDANCE * (
                self.denoise(self.teacher, x_t, *level, self.cond()) - without
            )
            fake = self.denoise(self.fake_score, x_t, *level, self.cond())
            weight = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
            target = x - (fake - real) / weight
        matching = 0.5 * functional.mse_loss(x, target)
        gan = functional.softplus(-self.logits(x, "gan_generator", self.cond())).mean()
        return matching + GAN * gan, {"loss_matching": matching, "loss_gan_generator": gan}, x

    def fake_turn(self, x):
        functional, x = self.torch.nn.functional, x.detach()
        alpha, sigma, time, noise = self.draws("fake")
        raw = self.fake_score(alpha * x + sigma * noise, time.reshape(-1), self.cond()).sample
        denoising = functional.mse_loss(raw, noise)  # what the x0 loss is with alpha^2 / sigma^2
        fake = self.logits(x, "gan_fake", self.cond())
        real = self.logits(self.image("real"), "gan_real", self.cond("real_cond"))
        head = functional.softplus(fake).mean() + functional.softplus(-real).mean()
        return denoising + GAN_FAKE * head, {"loss_fake_score": denoising, "loss_head": head}


def check(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def by_torchs_names(gradients):
    flat = flax.traverse_util.flatten_dict(jax.device_get(gradients), sep="/")
    return {torch_key(path): to_torch(path, leaf) for path, leaf in flat.items()}


def test_both_turns(ours):
    made, frozen, players, rows = ours
    peer = Peer(frozen, players, rows)

    def gradients(name, shared):
        loss = made.players[name].loss
        view = View(players, frozen, rows, shared)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(players[name], view)

    (loss, seen), found = gradients("generator", {})
    value, metrics, x = peer.generator_turn()
    value.backward()
    check(seen.shared["x"], x.detach().permute(0, 2, 3, 1))
    for name, one in metrics.items():
        check(seen.metrics[name], one.detach())
    check(loss, value.detach())
    found, theirs = by_torchs_names(found), dict(peer.generator.named_parameters())
    for name in NAMED["generator"]:
        check(found[name], theirs[name].grad)

    peer.fake_score.zero_grad()
    peer.head.zero_grad()
    (loss, seen), found = gradients("fake_score", seen.shared)
    value, metrics = peer.fake_turn(x)
    value.backward()
    for name, one in metrics.items():
        check(seen.metrics[name], one.detach())
    check(loss, value.detach())
    of_network, theirs = by_torchs_names(found["network"]), dict(peer.fake_score.named_parameters())
    for name in NAMED["fake_score"]:
        check(of_network[name], theirs[name].grad)
    kernel, logit = peer.head[0].weight.grad, peer.head[4].weight.grad
    check(found["head"]["whole_conv"]["kernel"].transpose(3, 2, 0, 1), kernel)
    check(found["head"]["logit"]["kernel"].T, logit)
