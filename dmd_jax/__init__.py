"""Distribution Matching Distillation in JAX: the parts for people who bring their own networks.

A denoiser is any function `denoise(params, x_t, level, cond) -> x0`. Source: arXiv 2311.18828, and
for the other objectives of the family what each function names.
Names are imported when they are first used, so that `import dmd_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dmd_jax import former

if TYPE_CHECKING:
    from dmd_jax.method.consistency import (
        consistency_function,
        euler_step,
        heun_step,
        karras_level,
        two_step_target,
    )
    from dmd_jax.method.denoisers import discrete_denoiser, edm_denoiser, guided
    from dmd_jax.method.discrete_samplers import ddim, dpm_solver_pp, pndm, unipc
    from dmd_jax.method.losses import (
        consistency_loss,
        denoising_loss,
        density_ratio,
        distribution_matching_gradient,
        distribution_matching_loss,
        divergence_weight,
        edm_weight,
        gan_generator_loss,
        gan_head_loss,
        ratio_means,
        regression_loss,
        sid_loss,
        snr_weight,
        truncated_snr_weight,
        uniform_weight,
    )
    from dmd_jax.method.samplers import euler, few_step, few_step_input, heun, one_step
    from dmd_jax.method.schedules import NoiseLevel, NoiseSchedule, forward_diffusion, score
    from dmd_jax.objectives import (
        Draws,
        Networks,
        draw,
        draw_lognormal,
        fake_score_loss,
        generator_loss,
        matching_loss,
        one_architecture,
    )

_MODULES = {
    "method.consistency": (
        "consistency_function",
        "euler_step",
        "heun_step",
        "karras_level",
        "two_step_target",
    ),
    "method.denoisers": ("discrete_denoiser", "edm_denoiser", "guided"),
    "method.discrete_samplers": ("ddim", "dpm_solver_pp", "pndm", "unipc"),
    "method.losses": (
        "consistency_loss",
        "denoising_loss",
        "density_ratio",
        "distribution_matching_gradient",
        "distribution_matching_loss",
        "divergence_weight",
        "edm_weight",
        "gan_generator_loss",
        "gan_head_loss",
        "ratio_means",
        "regression_loss",
        "sid_loss",
        "snr_weight",
        "truncated_snr_weight",
        "uniform_weight",
    ),
    "objectives": (
        "Draws",
        "Networks",
        "draw",
        "draw_lognormal",
        "fake_score_loss",
        "generator_loss",
        "matching_loss",
        "one_architecture",
    ),
    "method.samplers": ("euler", "few_step", "few_step_input", "heun", "one_step"),
    "method.schedules": ("NoiseLevel", "NoiseSchedule", "forward_diffusion", "score"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Draws",
    "Networks",
    "NoiseLevel",
    "NoiseSchedule",
    "consistency_function",
    "consistency_loss",
    "ddim",
    "denoising_loss",
    "density_ratio",
    "discrete_denoiser",
    "distribution_matching_gradient",
    "distribution_matching_loss",
    "divergence_weight",
    "dpm_solver_pp",
    "draw",
    "draw_lognormal",
    "edm_denoiser",
    "edm_weight",
    "euler",
    "euler_step",
    "fake_score_loss",
    "few_step",
    "few_step_input",
    "forward_diffusion",
    "gan_generator_loss",
    "gan_head_loss",
    "generator_loss",
    "guided",
    "heun",
    "heun_step",
    "karras_level",
    "matching_loss",
    "one_architecture",
    "one_step",
    "pndm",
    "ratio_means",
    "regression_loss",
    "score",
    "sid_loss",
    "snr_weight",
    "truncated_snr_weight",
    "two_step_target",
    "uniform_weight",
    "unipc",
]

former.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
