"""Networks by name: `build_denoiser` turns a configuration's mapping into a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmd_jax.errors import UserError
from dmd_jax.models.denoisers import Denoiser, edm_denoiser
from dmd_jax.models.dhariwal import DhariwalUNet
from dmd_jax.models.mixture import GaussianMixture, mixture_denoise
from dmd_jax.models.mlp import MLP
from dmd_jax.models.songunet import SongUNet

__all__ = ["DTYPES", "Denoiser", "build_denoiser", "complete", "edm_denoiser"]

_NETWORKS = {
    "songunet": SongUNet,
    "dhariwal": DhariwalUNet,
    "mlp": MLP,
    "gaussian_mixture": GaussianMixture,
}
_SIGMA_DATA = (1e-4, 1e4)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_denoiser(network: Mapping[str, Any], *, dtype: str = "float32") -> Denoiser:
    """The denoiser that `network` describes.

    Args:
      network: JSON-able: "name" ("songunet", "dhariwal", "mlp" or "gaussian_mixture") and that
        network's options, which are the fields of SongUNet, DhariwalUNet, MLP or GaussianMixture;
        the trained ones also take "sigma_data" (0.5).
      dtype: "float32" or "bfloat16", what a trained network computes in. Parameters, inputs and
        outputs are float32 in both.

    Returns:
      A Denoiser. A trained network's `denoise` also takes the keyword `dropout_key`, which turns
      dropout on.

    Raises:
      UserError: an unknown name, option or dtype, a missing option, or a bad value.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    options = complete(network)
    name = options.pop("name")
    sigma_data = options.pop("sigma_data", None)
    if sigma_data is not None and not _SIGMA_DATA[0] <= sigma_data <= _SIGMA_DATA[1]:
        least, most = _SIGMA_DATA
        raise UserError(
            f"network {name} option sigma_data is {sigma_data}; expected {least} to {most}"
        )
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if not _is_trained(name):
        mixture = GaussianMixture(**options)
        return Denoiser(mixture.init, mixture_denoise, mixture.sample_shape, num_classes=0)

    module = _NETWORKS[name](**options, dtype=DTYPES[dtype])

    def apply(params, x, c_noise, labels, *, dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return module.apply(
            {"params": params}, x, c_noise, labels, deterministic=dropout_key is None, rngs=rngs
        )

    @jax.jit  # the forward pass that Linen's init makes is then never run
    def init(key):
        labels = jnp.zeros((1, module.label_dim)) if module.label_dim else None
        return module.init(key, jnp.zeros((1, *module.sample_shape)), jnp.zeros(1), labels)[
            "params"
        ]

    denoise = edm_denoiser(apply, sigma_data=sigma_data, label_dim=module.label_dim)
    return Denoiser(init, denoise, module.sample_shape, module.label_dim)


def complete(network: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with every option, so that two mappings of one network are equal.

    Args:
      network: as for build_denoiser.

    Returns:
      "name", the options in the order of the network's fields with lists for sequences, and where
      the network is a trained one "sigma_data".

    Raises:
      UserError: an unknown name or option, a missing option, or one of another type.
    """
    options = dict(network)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _NETWORKS:
        raise UserError(f"network name is {name!r}; expected one of {', '.join(_NETWORKS)}")
    fields = {f.name: f for f in dataclasses.fields(_NETWORKS[name]) if f.init}
    for internal in ("parent", "name", "dtype"):
        fields.pop(internal, None)
    defaults = {k: f.default for k, f in fields.items() if f.default is not dataclasses.MISSING}
    types = {key: str(field.type) for key, field in fields.items()}
    if _is_trained(name):
        defaults["sigma_data"], types["sigma_data"] = 0.5, "float"
    _check_options(name, options, types, required=[key for key in types if key not in defaults])
    options = {key: options.get(key, defaults.get(key)) for key in types}
    return {"name": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _is_trained(name: str) -> bool:
    return issubclass(_NETWORKS[name], nn.Module)


def _check_options(
    name: str, options: Mapping[str, Any], types: Mapping[str, str], *, required: list[str]
) -> None:
    unknown = [key for key in options if key not in types]
    if unknown:
        raise UserError(
            f"network {name} has no option {', '.join(map(repr, unknown))}; "
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
            raise UserError(f"network {name} option {key} is {value!r}; expected {types[key]}")


def _is_of(value: Any, annotation: str) -> bool:
    """Whether a JSON value is what a field's annotation says, for the plain ones among them."""
    plain = {"int": int, "float": (int, float), "str": str, "bool": bool}
    if annotation in plain:
        return isinstance(value, plain[annotation])
    if annotation in ("Sequence[int]", "Sequence[float]"):
        inner = plain[annotation[len("Sequence[") : -1]]
        return isinstance(value, (list, tuple)) and all(isinstance(each, inner) for each in value)
    return True
