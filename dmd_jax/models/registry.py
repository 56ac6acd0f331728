"""Networks by name: what a configuration's mapping describes, checked, and built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.method.denoisers import PREDICTION_TYPES
from dmd_jax.method.precision import PRECISIONS
from dmd_jax.models.clip.text import CLIPText
from dmd_jax.models.clip.vision import CLIPVision
from dmd_jax.models.edm.dhariwal import DhariwalUNet
from dmd_jax.models.edm.songunet import SongUNet
from dmd_jax.models.ops.remat import REMATS
from dmd_jax.models.plane.mixture import GaussianMixture
from dmd_jax.models.plane.mlp import MLP
from dmd_jax.models.stable_diffusion.autoencoder_kl import AutoencoderKL
from dmd_jax.models.stable_diffusion.autoencoder_tiny import AutoencoderTiny
from dmd_jax.models.stable_diffusion.unet2d_condition import UNet2DConditionModel

# Options of the denoiser around a network rather than of the network: annotation and default.
_EDM = {"sigma_data": ("float", 0.5)}
_DISCRETE = {
    "prediction_type": ("str", "epsilon"),
    "beta_start": ("float", 0.00085),
    "beta_end": ("float", 0.012),
    "num_train_timesteps": ("int", 1000),
}
_LIMITS = {
    "sigma_data": (1e-4, 1e4),
    "beta_start": (1e-8, 0.5),
    "beta_end": (1e-8, 0.5),
    "num_train_timesteps": (2, 100_000),
}
# Name -> the network and those options.
DENOISERS = {
    "songunet": (SongUNet, _EDM),
    "dhariwal": (DhariwalUNet, _EDM),
    "mlp": (MLP, _EDM),
    "gaussian_mixture": (GaussianMixture, {}),
    "unet2d_condition": (UNet2DConditionModel, _DISCRETE),
}
_NETWORKS = DENOISERS | {
    "autoencoder_kl": (AutoencoderKL, {}),
    "autoencoder_tiny": (AutoencoderTiny, {}),
    "clip_text": (CLIPText, {}),
    "clip_vision": (CLIPVision, {}),
}
# Fields that a mapping does not hold: Linen's own, and those that are arguments of the builders.
_INTERNAL = ("parent", "name", "dtype", "precision", "remat")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_network(
    network: Mapping[str, Any],
    *,
    dtype: str = "float32",
    precision: str = "highest",
    remat: str = "none",
) -> nn.Module:
    """The network that `network` describes, be it a denoiser's or not.

    Args:
      network: JSON-able: "name" and the network's options, which are the fields of SongUNet
        ("songunet"), DhariwalUNet ("dhariwal"), MLP ("mlp"), GaussianMixture ("gaussian_mixture"),
        UNet2DConditionModel ("unet2d_condition"), AutoencoderKL ("autoencoder_kl"),
        AutoencoderTiny ("autoencoder_tiny"), CLIPText ("clip_text") or CLIPVision ("clip_vision").
        The first three also take "sigma_data" (0.5). unet2d_condition takes "prediction_type"
        ("epsilon", "v_prediction" or "sample"), and for its schedule "beta_start" (0.00085),
        "beta_end" (0.012) and "num_train_timesteps" (1000).
      dtype: "float32" or "bfloat16", what it computes in. Parameters are float32 in both.
      precision: "highest", "high" or "default", of float32 products (see method.precision): of all
        in float32, and in bfloat16 of the few that are float32 there too.
      remat: what the backward pass computes again rather than keeps: "none", "full" or "dots"
        (see models.ops.remat); the last two are for U-Nets.

    Returns:
      A Linen module; a GaussianMixture for "gaussian_mixture", which is none.

    Raises:
      UserError: an unknown name, option, dtype, precision or remat, a missing option, or a bad
        value.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if remat not in REMATS:
        raise UserError(f"remat is {remat!r}; expected one of {', '.join(REMATS)}")
    options = complete(network)
    name = options.pop("name")
    module, around = _NETWORKS[name]
    _check_around(name, {key: options.pop(key) for key in around})
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    fields = [field.name for field in dataclasses.fields(module)]
    if "dtype" in fields:
        options |= {"dtype": DTYPES[dtype], "precision": precision}
    if "remat" in fields:
        options["remat"] = remat
    elif remat != "none":
        raise UserError(f"remat is {remat!r}; expected none, network {name} knows no other")
    return module(**options)


def abstract_params(network: Mapping[str, Any]) -> Any:
    """The shapes of the network's parameters, without making any.

    Args:
      network: as for build_network.

    Returns:
      A nested dict of jax.ShapeDtypeStruct, float32.

    Raises:
      UserError: as build_network.
    """
    return jax.eval_shape(initialiser(build_network(network)), jax.random.key(0))


def complete(network: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with every option, so that two mappings of one network are equal.

    Args:
      network: as for build_network.

    Returns:
      "name", the options in the order of the network's fields with lists for sequences, and those
      of the denoiser around it.

    Raises:
      UserError: an unknown name or option, a missing option, or one of another type.
    """
    options = dict(network)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _NETWORKS:
        raise UserError(f"network name is {name!r:.100}; expected one of {', '.join(_NETWORKS)}")
    module, around = _NETWORKS[name]
    fields = {f.name: f for f in dataclasses.fields(module) if f.init and f.name not in _INTERNAL}
    defaults = {k: f.default for k, f in fields.items() if f.default is not dataclasses.MISSING}
    defaults |= {key: default for key, (_, default) in around.items()}
    types = {key: str(field.type) for key, field in fields.items()}
    types |= {key: annotation for key, (annotation, _) in around.items()}
    _check_options(name, options, types, required=[key for key in types if key not in defaults])
    options = {key: options.get(key, defaults.get(key)) for key in types}
    return {"name": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def initialiser(module: Any) -> Callable[[jax.Array], Any]:
    """key -> the random parameters of what build_network returns."""
    if not isinstance(module, nn.Module):
        return module.init

    @jax.jit  # the forward pass that Linen's init makes is then never run
    def init(key):
        return module.init(key, *module.example_inputs())["params"]

    return init


def _check_around(name: str, values: Mapping[str, Any]) -> None:
    """Refuses values of the options of the denoiser around a network."""
    for key, value in values.items():
        if key == "prediction_type":
            expected = "" if value in PREDICTION_TYPES else f"one of {', '.join(PREDICTION_TYPES)}"
        else:
            least, most = _LIMITS[key]
            expected = "" if least <= value <= most else f"{least} to {most}"
        if expected:
            raise UserError(f"network {name} option {key} is {value!r:.100}; expected {expected}")
    if values.get("beta_start", 0) > values.get("beta_end", 0):
        raise UserError(
            f"network {name} option beta_start is {values['beta_start']}; expected at most "
            f"beta_end, {values['beta_end']}"
        )


def _check_options(
    name: str, options: Mapping[str, Any], types: Mapping[str, str], *, required: list[str]
) -> None:
    unknown = [key for key in options if key not in types]
    if unknown:
        raise UserError(
            f"network {name} has no option {', '.join(map(repr, unknown)):.100}; "
            f"expected some of {', '.join(types)}"
        )
    missing = [key for key in required if key not in options]
    if missing:
        raise UserError(
            f"network {name} lacks the option {', '.join(missing)}; "
            f"expected at least {', '.join(required)}"
        )
    for key, value in options.items():
        if not _is_of(value, types[key]):
            raise UserError(f"network {name} option {key} is {value!r:.100}; expected {types[key]}")


def _is_of(value: Any, annotation: str) -> bool:
    """Whether a JSON value is what a field's annotation says, for the plain ones among them."""
    if " | " in annotation:
        return any(_is_of(value, part) for part in annotation.split(" | "))
    plain = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    if annotation in plain:
        if isinstance(value, bool):  # which is a number to Python
            return annotation == "bool"
        return isinstance(value, plain[annotation])
    if annotation in ("Sequence[int]", "Sequence[float]", "Sequence[str]"):
        inner = annotation[len("Sequence[") : -1]
        return isinstance(value, (list, tuple)) and all(_is_of(each, inner) for each in value)
    return True
