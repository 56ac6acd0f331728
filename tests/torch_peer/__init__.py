"""Peers of `dmd-jax bench` in PyTorch, with the weights and the inputs of our side.

    PYTHONPATH=. dmd-jax bench --config FILE --peer tests.torch_peer:eager

times the same step, or the same images, written as one would write them in PyTorch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import jax
import torch
from ml_collections import ConfigDict

from dmd_jax.errors import UserError
from dmd_jax.performance.benchmark.own_images import OwnImages
from dmd_jax.performance.benchmark.own_step import OwnStep
from dmd_jax.performance.benchmark.rivals import Rival

from .images import TorchImages
from .step import TorchStep


def eager(config: ConfigDict, own: OwnStep | OwnImages) -> Callable[[], Rival]:
    """The peer of a training step, or of the one-step generator's images.

    Raises:
      UserError: PyTorch has not the one device that JAX has.
    """
    return _peer(config, own, compiled=False)


def compiled(config: ConfigDict, own: OwnStep | OwnImages) -> Callable[[], Rival]:
    """As `eager`, with its networks sent through torch.compile."""
    return _peer(config, own, compiled=True)


def _peer(config: ConfigDict, own: OwnStep | OwnImages, *, compiled: bool) -> Callable[[], Rival]:
    device = torch_device(config.matmul_precision)

    def of_step() -> Rival:
        params, batch = own.on_host()
        step = TorchStep(config, params, device=device, compiled=compiled)
        rows = step.to_device(batch)
        return _rival([lambda: step(rows)], device)

    def of_images() -> Rival:
        options = {"decoder": own.decoder, "device": device, "compiled": compiled}
        return _rival([TorchImages(config, *own.on_host(), **options)], device)

    return of_step if isinstance(own, OwnStep) else of_images


def torch_device(precision: str) -> torch.device:
    """PyTorch's device that is JAX's, set to compute float32 products at one of PRECISIONS.

    Raises:
      UserError: there is none, or JAX has several.
    """
    platform, count = jax.default_backend(), jax.device_count()
    if count > 1:
        raise UserError(f"--peer on {count} devices; expected one, which is what PyTorch is given")
    if platform not in ("cpu", "gpu"):
        raise UserError(f"--peer on {platform}; expected a CPU or a GPU")
    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"--peer: JAX is on a GPU and torch {torch.__version__} finds none; expected a torch "
            "that was built for it"
        )
    exact = precision == "highest"
    torch.set_float32_matmul_precision("highest" if exact else "high")  # high is TF32
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if platform == "gpu" else "cpu")


def _rival(held: list[Callable[[], Any]], device: torch.device) -> Rival:
    """The rival whose work is the one callable of a list, which is emptied on its release."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def work() -> None:
        held[0]()
        if on_gpu:
            torch.cuda.synchronize(device)

    def facts() -> dict[str, Any]:
        # Nobody counts on a CPU.
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
        return {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "peak_bytes": peak,
        }

    def release() -> None:
        held.clear()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()

    return Rival(work, facts, release)
