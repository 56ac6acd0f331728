"""Networks, and the doors to them: a configuration's mapping becomes a network or a denoiser."""

from __future__ import annotations

from dmd_jax.method.denoisers import Denoiser, discrete_denoiser, edm_denoiser, guided
from dmd_jax.models.building import build_denoiser
from dmd_jax.models.registry import DTYPES, abstract_params, build_network, complete

__all__ = [
    "DTYPES",
    "Denoiser",
    "abstract_params",
    "build_denoiser",
    "build_network",
    "complete",
    "discrete_denoiser",
    "edm_denoiser",
    "guided",
]
