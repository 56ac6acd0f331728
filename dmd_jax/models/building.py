"""`build_denoiser`: a configuration's mapping becomes a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.denoisers import (
    Denoiser,
    discrete_denoiser,
    edm_denoiser,
    edm_features,
)
from dmd_jax.method.schedules import NoiseSchedule
from dmd_jax.models.plane.mixture import mixture_denoise
from dmd_jax.models.registry import DENOISERS, build_network, complete, initialiser
from dmd_jax.models.stable_diffusion.unet2d_condition import TOKENS


def build_denoiser(
    network: Mapping[str, Any],
    *,
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
) -> Denoiser:
    """The denoiser that `network` describes.

    Args:
      network, dtype, precision, remat: as for registry.build_network; "name" is "songunet",
        "dhariwal", "mlp", "gaussian_mixture" or "unet2d_condition". Inputs and outputs are float32
        in every dtype.

    Returns:
      A Denoiser. The `denoise` of EDM's networks also takes the keyword `dropout_key`, which turns
      dropout on.

    Raises:
      UserError: as build_network, and a network that denoises nothing.
    """
    options = complete(network)
    name = options["name"]
    if name not in DENOISERS:
        raise UserError(f"network {name} denoises nothing; expected one of {', '.join(DENOISERS)}")
    module = build_network(options, dtype=dtype, precision=precision, remat=remat)
    init = initialiser(module)
    if name == "gaussian_mixture":
        return Denoiser(init, mixture_denoise, module.sample_shape, 0, NoiseSchedule.edm())
    if name == "unet2d_condition":
        return _of_stable_diffusion(module, init, options)

    def apply(params, x, c_noise, labels, *, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return module.apply(
            {"params": params}, x, c_noise, labels, deterministic=dropout_key is None, rngs=rngs
        )

    def encode(params, x, c_noise, labels):
        return module.apply({"params": params}, x, c_noise, labels, bottleneck=True)

    around = {"sigma_data": options["sigma_data"], "label_dim": module.label_dim}
    return Denoiser(
        init,
        edm_denoiser(apply, **around),
        module.sample_shape,
        module.label_dim,
        NoiseSchedule.edm(),
        features=edm_features(encode, **around),
        sigma_data=options["sigma_data"],
    )


def _of_stable_diffusion(module, init, options: Mapping[str, Any]) -> Denoiser:
    if module.in_channels != module.out_channels:
        raise UserError(
            f"network {options['name']} makes {module.out_channels} channels of "
            f"{module.in_channels}; expected in_channels and out_channels equal in a denoiser"
        )

    def apply(params, x_t, time, context):
        return module.apply({"params": params}, x_t, time, context)

    schedule = NoiseSchedule.scaled_linear(
        options["num_train_timesteps"],
        beta_start=options["beta_start"],
        beta_end=options["beta_end"],
    )

    def features(params, x_t, level, context):
        variables = {"params": params}
        x_t = x_t.astype(jnp.float32)
        return module.apply(variables, x_t, level.time, context, bottleneck=True).astype(
            jnp.float32
        )

    denoise = discrete_denoiser(apply, prediction_type=options["prediction_type"])
    cond_shape = (TOKENS, module.cross_attention_dim)
    return Denoiser(init, denoise, module.sample_shape, 0, schedule, cond_shape, features)
