"""Teachers of pixels, with class labels or without a condition: EDM's networks and the MLP."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.method import samplers
from dmd_jax.models import Denoiser, build_denoiser
from dmd_jax.storage.weights import Weights, params_sha256
from dmd_jax.teachers.family import (
    GENERATORS,
    Family,
    Networks,
    Pipeline,
    generator_sampler,
)
from dmd_jax.teachers.teacher import Frozen, Sample, Teacher, Tokens

_MULTI_STEP = {"heun": samplers.heun, "euler": samplers.euler}
_SAMPLERS = (*GENERATORS, *_MULTI_STEP)
_OPTIONS = ("s_churn", "s_min", "s_max", "s_noise")  # of heun and euler
_OWN_OPTIONS = {"one-step": ("sigma",), "few-step": ()}


def edm_teacher(denoiser: Denoiser) -> Teacher:
    """The teacher around a network whose condition is a label, or None.

    Frozen arrays: "network". Tokens: "label" int32 [B], where the network has classes. Samplers:
    one-step, few-step, heun and euler; without guidance, as there is no condition of nothing.
    """
    count = denoiser.num_classes

    def encode(frozen: Frozen, tokens: Tokens) -> jax.Array | None:
        return tokens["label"] if count else None

    def draw_tokens(key: jax.Array, rows: int) -> Tokens:
        return {"label": jax.random.randint(key, (rows,), 0, count, jnp.int32)} if count else {}

    return Teacher(
        denoise=denoiser.denoise,
        schedule=denoiser.schedule,
        features=denoiser.features,
        sigma_data=denoiser.sigma_data,
        sample_shape=denoiser.sample_shape,
        tokens={"label": jax.ShapeDtypeStruct((), jnp.int32)} if count else {},
        encode=encode,
        null=lambda frozen: None,
        decode=lambda frozen, x0: x0,
        draw_tokens=draw_tokens,
        samplers={name: functools.partial(_sampler, denoiser, name) for name in _SAMPLERS},
        limits={"label": count} if count else {},
        check=functools.partial(_checked, count),
    )


def _sampler(
    denoiser: Denoiser, name: str, *, num_steps: int, guidance: float = 1.0, **options: float
) -> Sample:
    """(frozen, z, cond, key) -> x0, by one of _SAMPLERS.

    Args:
      options: of _OPTIONS; of one-step, "sigma", as for samplers.one_step.
    """
    if guidance != 1:
        raise UserError(f"guidance {guidance:g}; expected 1 for a network of labels or of none")
    known = _OWN_OPTIONS.get(name, _OPTIONS)
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"the {name} sampler takes no {', '.join(unknown)}")
    if name in GENERATORS:
        return generator_sampler(denoiser, 1 if name == "one-step" else num_steps, **options)
    if num_steps < 1:
        raise UserError(f"{num_steps} sampling steps; expected at least 1")
    return lambda frozen, z, cond, key: _MULTI_STEP[name](
        denoiser.denoise, frozen["network"], z, cond, num_steps=num_steps, key=key, **options
    )


def _checked(num_classes: int, tokens: Mapping[str, Any], rows: int) -> Tokens:
    """The labels int32 [rows]; a network without classes takes none, and zeros as well."""
    if unknown := tokens.keys() - {"label"}:
        raise UserError(f"tokens {', '.join(sorted(unknown))}; expected label alone")
    labels = tokens.get("label")
    if labels is None:
        if num_classes:
            raise UserError(
                f"labels are None; expected integers [{rows}] of the network's "
                f"{num_classes} classes"
            )
        return {}
    labels = np.asarray(labels)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels are {labels.dtype} of shape {labels.shape}; expected integers [{rows}], "
            "one for each latent"
        )
    wrong = labels[(labels < 0) | (labels >= max(num_classes, 1))]
    if wrong.size and num_classes:
        raise UserError(f"label {wrong[0]}; expected 0 to {num_classes - 1}")
    if wrong.size:
        raise UserError(f"label {wrong[0]} for a network without classes; expected None")
    return {"label": labels.astype(np.int32)} if num_classes else {}


def _build(networks: Networks, **computation: str) -> Teacher:
    return edm_teacher(build_denoiser(networks["network"], **computation))


def _load(
    weights: Weights, folder: Path, *, dtype: str, precision: str, **options: Any
) -> Pipeline:
    teacher = _build({"network": weights.network}, dtype=dtype, precision=precision)
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{folder} are {EDM.weights_are}; expected no {', '.join(given)}")
    return Pipeline(
        family=EDM,
        teacher=teacher,
        weights=weights,
        frozen={"network": weights.params},
        identity=lambda: {"params_sha256": params_sha256(weights.params)},
    )


EDM = Family(
    networks=("songunet", "dhariwal", "mlp", "gaussian_mixture"),
    takes="labels",
    weights_are="no text-to-image weights",
    network_is="no text-to-image network",
    samplers=_SAMPLERS,
    pair_samplers=("heun",),
    arguments=_OPTIONS,
    defaults={"steps": 18, "batch_size": 256},
    build=_build,
    load=_load,
)
