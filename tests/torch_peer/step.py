"""The train step of `train_step.make_train_step` as it is written in PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from dmd_jax.config import settings_of
from dmd_jax.models import build_denoiser, complete

from .losses import (
    Distance,
    denoising_loss,
    diffused,
    matching_gradient,
    matching_loss,
)
from .networks import (
    Denoiser,
    Level,
    Schedule,
    autocast,
    build_torch,
    frozen,
    load_params,
    to_nchw,
)

Batch = dict[str, dict[str, Tensor]]


class Draws(NamedTuple):
    """All that is random in a step, for the whole batch. Images are NCHW, levels are indices."""

    z: Tensor  # fresh latents
    label: Tensor | None  # theirs, where there are classes
    matching: tuple[Tensor, Tensor]  # index [B], noise [B, C, H, W]
    fake: tuple[Tensor, Tensor]


class TorchStep:
    """The config's train step on one device.

    It is written as one would in PyTorch: channels-last, autocast where compute_dtype is bfloat16,
    checkpointing where config.remat asks for it, fused AdamW, no gradient for what is frozen.

    Args:
      params: the frozen parameters of our step, as host arrays.
      compiled: the networks and the distance go through torch.compile.

    Attributes:
      trained, optimizers: "generator" and "fake_score". ema: of the generator, or None.

    Raises:
      UserError: a network that has no peer.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Mapping[str, Any],
        *,
        device: torch.device,
        compiled: bool = False,
    ):
        self._config, self._device, self._step = config, device, 0
        self._settings = settings_of(config)
        network = complete(config.network.to_dict())
        ours = build_denoiser(network)
        denoiser = load_params(Denoiser(network), {"network": params["network"]})
        self._schedule, self._num_classes = Schedule(ours.schedule, device), ours.num_classes
        self._shape = (ours.sample_shape[2], *ours.sample_shape[:2])
        denoiser = denoiser.to(device, memory_format=torch.channels_last)
        self.trained = {name: copy.deepcopy(denoiser) for name in ("generator", "fake_score")}
        if config.remat != "none":
            for module in self.trained.values():
                module.network.enable_gradient_checkpointing()
                module.train()  # diffusers heeds it in this mode alone
        keeps_ema = self._settings.ema_decay > 0
        self.ema = frozen(copy.deepcopy(denoiser), device) if keeps_ema else None
        self.optimizers = {
            name: _optimizer(config.optimizer[name], module)
            for name, module in self.trained.items()
        }
        self._schedulers = {
            name: torch.optim.lr_scheduler.LambdaLR(
                optimizer, _warm_up(config.optimizer[name].warmup_steps)
            )
            for name, optimizer in self.optimizers.items()
        }
        self._uncond = self._encoder = None
        if "null" in params:
            self._uncond = torch.tensor(params["null"], device=device)
        if "text_encoder" in params:
            encoder = build_torch(config.teacher.text_encoder.to_dict())
            self._encoder = frozen(load_params(encoder, params["text_encoder"]), device)
        self._call: dict[str, Any] = {
            **self.trained,
            "teacher": frozen(denoiser, device),
            "distance": Distance(config, params, device),
        }
        if compiled:
            for name, module in self._call.items():
                self._call[name] = torch.compile(module, dynamic=False)

    def to_device(self, batch: Mapping[str, Mapping[str, Any]]) -> Batch:
        """A batch of ours, host arrays, as `__call__` takes it."""
        return {
            source: {
                name: to_nchw(array, self._device)
                if name in ("z_ref", "y_ref")
                else _indices(torch.tensor(array, device=self._device))
                for name, array in rows.items()
            }
            for source, rows in batch.items()
        }

    def draw(self) -> Draws:
        """What `make_train_step` draws, from PyTorch's generator."""
        settings = self._settings
        count = settings.batch_size
        fresh = count - settings.match_reference * settings.regression_batch_size
        label = None
        if self._num_classes:
            label = torch.randint(self._num_classes, (fresh,), device=self._device)
        bins = ((settings.min_index, settings.max_index + 1), (0, self._schedule.num_levels))
        matching, fake = (
            (torch.randint(*ends, (count,), device=self._device), self._normal(count))
            for ends in bins
        )
        return Draws(self._normal(fresh), label, matching, fake)

    def __call__(self, batch: Batch, draws: Draws | None = None) -> dict[str, Tensor]:
        """One step of both networks; returns losses and gradient norms."""
        config = self._config
        update = self._step % self._settings.generator_every == 0
        whole = self._whole(batch, draws or self.draw())
        metrics: dict[str, Tensor] = {}
        groups = math.gcd(config.batch_size, len(whole["y_ref"]))
        for index in range(config.accumulation):
            part = _groups(whole, groups, slice(index, None, config.accumulation))
            for name, loss in self._gradients(part, update).items():
                metrics[name] = metrics.get(name, 0.0) + loss / config.accumulation
        for name, module in self.trained.items():
            if name == "fake_score" or update:
                clip_norm = config.optimizer[name].clip_norm
                norm = nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
                metrics[f"grad_norm_{name}"] = norm
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()
            counts = config.optimizer[name].warmup_counts
            if name == "fake_score" or update or counts == "steps":
                self._schedulers[name].step()
        if update and self.ema is not None:
            self._average(self._step // self._settings.generator_every)
        self._step += 1
        return metrics

    def _normal(self, count: int) -> Tensor:
        noise = torch.randn(count, *self._shape, device=self._device)
        return noise.to(memory_format=torch.channels_last)

    def _whole(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        """What the whole step sees, from which micro-batches take their rows."""
        pairs = batch["pairs"]
        cond, cond_ref = draws.label, pairs.get("label")
        if self._encoder is not None:
            with torch.no_grad(), autocast(self._config, self._device):
                cond, cond_ref = (
                    self._encoder(batch[source]["tokens"]).last_hidden_state.float()
                    for source in ("prompts", "pairs")
                )
        elif self._uncond is not None:
            cond, cond_ref = batch["prompts"]["cond"], pairs["cond"]
        found = {
            "z": draws.z,
            "cond": cond,
            "y_ref": pairs["y_ref"],
            "matching": draws.matching,
            "fake": draws.fake,
        }
        if not self._settings.match_reference:
            return found | {"z_ref": pairs["z_ref"], "cond_ref": cond_ref}
        joined = None if cond is None else _join_pairs(cond, cond_ref)
        return found | {"z": _join_pairs(draws.z, pairs["z_ref"]), "cond": joined}

    def _gradients(self, part: dict[str, Any], update: bool) -> dict[str, Tensor]:
        """Adds a micro-batch's share to both networks' gradients; returns its losses."""
        config, losses = self._config, {}
        with autocast(config, self._device), torch.set_grad_enabled(update):
            x = self._generate(part["z"], part["cond"])
            loss = self._generator_losses(part, x, losses) if update else None
        if update:
            (loss / config.accumulation).backward()
        x0, (index, noise) = x.detach(), part["fake"]
        level = self._schedule.level(index)
        with autocast(config, self._device):
            x_t = diffused(x0, noise, level)
            denoised = self._call["fake_score"](x_t, level, part["cond"])
            sigma_data = self.trained["fake_score"].sigma_data
            loss = denoising_loss(denoised, x0, level, sigma_data)
        (loss / config.accumulation).backward()
        return losses | {"loss_fake_score": loss.detach()}

    def _generator_losses(
        self, part: dict[str, Any], x: Tensor, losses: dict[str, Tensor]
    ) -> Tensor:
        """The generator's loss; its parts are put in `losses`."""
        total = torch.zeros((), device=self._device)
        if self._settings.matching_weight:
            gradient = self._matching(x.detach(), part)
            losses["loss_matching"] = matching_loss(x, gradient)
            total = self._settings.matching_weight * losses["loss_matching"]
        if self._settings.regression_weight:
            if "z_ref" in part:
                x_ref = self._generate(part["z_ref"], part["cond_ref"])
            else:
                x_ref = _take_pairs(x, len(part["y_ref"]))
            regression = self._call["distance"](x_ref, part["y_ref"]).mean()
            losses["loss_regression"] = regression
            total = total + self._settings.regression_weight * regression
        losses["loss_generator"] = total
        for name, loss in losses.items():
            losses[name] = loss.detach()
        return total

    @torch.no_grad()
    def _matching(self, x: Tensor, part: dict[str, Any]) -> Tensor:
        index, noise = part["matching"]
        level, cond = self._schedule.level(index), part["cond"]
        x_t = diffused(x, noise, level)
        real = self._real(x_t, level, cond)
        fake = self._call["fake_score"](x_t, level, cond)
        return matching_gradient(x, real, fake, level, self._config)

    def _real(self, x_t: Tensor, level: Level, cond: Tensor | None) -> Tensor:
        """The teacher's prediction, guided by the empty prompt where images are of text."""
        if self._uncond is None or self._config.teacher.guidance == 1:
            return self._call["teacher"](x_t, level, cond)
        both = self._call["teacher"](
            torch.cat([x_t, x_t]),
            tuple(torch.cat([value, value]) for value in level),
            torch.cat([cond, self._uncond.expand_as(cond)]),
        )
        with_cond, without = both.chunk(2)
        return torch.lerp(without, with_cond, self._config.teacher.guidance)

    def _generate(self, z: Tensor, cond: Tensor | None) -> Tensor:
        return self._schedule.one_step(self._call["generator"], z, cond)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self._settings.ema_decay, (1 + step) / (10 + step))
        averages, current = (
            list(module.parameters()) for module in (self.ema, self.trained["generator"])
        )
        torch._foreach_lerp_(averages, current, 1 - decay)


def _optimizer(options: ConfigDict, module: nn.Module) -> torch.optim.Optimizer:
    """That of a player, by its part of config.optimizer."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )


def _warm_up(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, step / steps) if steps else 1.0


def _indices(tensor: Tensor) -> Tensor:
    """Integers as PyTorch's own functions want them."""
    return tensor if tensor.is_floating_point() else tensor.long()


def _groups(tree: Any, groups: int, chosen: slice) -> Any:
    """The rows of the chosen among that many groups, of every tensor in a tree."""
    if isinstance(tree, dict):
        return {name: _groups(value, groups, chosen) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_groups(value, groups, chosen) for value in tree)
    return None if tree is None else tree.unflatten(0, (groups, -1))[chosen].flatten(0, 1)


def _join_pairs(fresh: Tensor, pairs: Tensor) -> Tensor:
    """As matching.join_pairs."""
    groups = math.gcd(len(fresh), len(pairs))
    return torch.cat([rows.unflatten(0, (groups, -1)) for rows in (fresh, pairs)], 1).flatten(0, 1)


def _take_pairs(x: Tensor, count: int) -> Tensor:
    """As matching.take_pairs."""
    groups = math.gcd(len(x), count)
    return x.unflatten(0, (groups, -1))[:, -(count // groups) :].flatten(0, 1)
