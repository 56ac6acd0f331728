"""EDM's checkpoints: from an EDMPrecond state dict to this project's parameters, with NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.models import build_denoiser

# Of EDMPrecond's keyword arguments, those that do not change what the network computes when it
# denoises: they concern training, clamp no sigma in use, or choose a precision.
_IRRELEVANT = ("augment_dim", "label_dropout", "use_fp16", "sigma_min", "sigma_max")
_SHOWN = 20


def network_from_init_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `network` mapping (see build_denoiser) of an EDMPrecond's keyword arguments.

    Raises:
      UserError: another network than SongUNet, no img_channels, or an argument that is unknown.
    """
    options = {key: value for key, value in kwargs.items() if key not in _IRRELEVANT}
    model_type = options.pop("model_type", None)
    if model_type != "SongUNet":
        raise UserError(f"EDM model_type is {model_type!r}; expected 'SongUNet'")
    if "img_channels" not in options:
        raise UserError("EDM keyword arguments lack img_channels; expected the image's channels")
    channels = options.pop("img_channels")
    network = {"name": "songunet", "in_channels": channels, "out_channels": channels, **options}
    build_denoiser(network)
    return network


def params_from_state_dict(
    state_dict: Mapping[str, np.ndarray], network: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of `network` from an EDMPrecond state dict.

    Left out are `map_augment.weight`, which multiplies augmentation labels that only the
    teacher's own training has (it has no bias, so that without labels it adds nothing), and the
    `resample_filter` buffers, which are the network's option of that name; they are compared
    with it.

    Args:
      state_dict: keys "model....", PyTorch's layouts (OIHW, [out, in]), float16 or float32.
      network: "name": "songunet" and its options, as for build_denoiser.

    Returns:
      A nested dict of float32 NumPy arrays.

    Raises:
      UserError: keys that are missing, unexpected or of another shape, all listed.
    """
    if network.get("name") != "songunet":
        raise UserError(f"network name is {network.get('name')!r}; expected 'songunet'")
    template = jax.eval_shape(build_denoiser(network).init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_their_key(path): _their_shape(leaf.shape) for path, leaf in leaves}
    state_dict = {key: np.asarray(value) for key, value in state_dict.items()}

    missing = [key for key in expected if key not in state_dict]
    extra = [key for key in state_dict if key not in expected and not _left_out(key)]
    misshapen = [
        f"{key} {state_dict[key].shape}, expected {shape}"
        for key, shape in expected.items()
        if key in state_dict and state_dict[key].shape != shape
    ]
    misshapen += _foreign_filters(state_dict, network.get("resample_filter", (1, 1)))
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:_SHOWN])}{', ...' * (len(found) > _SHOWN)}"
        for kind, found in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if found
    ]
    if problems:
        raise UserError(f"EDM state dict does not fit the network: {'; '.join(problems)}")
    return jax.tree_util.tree_unflatten(structure, [_our_array(state_dict[k]) for k in expected])


def _their_key(path) -> str:
    *modules, leaf = (entry.key for entry in path)
    # Ours: enc_32x32_block0/conv0/kernel. EDM's: model.enc.32x32_block0.conv0.weight.
    if modules[0].startswith(("enc_", "dec_")):
        modules[0] = modules[0].replace("_", ".", 1)
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join(("model", *modules, leaf))


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _our_array(array: np.ndarray) -> np.ndarray:
    # OIHW -> HWIO, [out, in] -> [in, out]; vectors stay.
    array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array, dtype=np.float32)


def _left_out(key: str) -> bool:
    return key == "model.map_augment.weight" or key.endswith(".resample_filter")


def _foreign_filters(state_dict: Mapping[str, np.ndarray], taps) -> list[str]:
    taps = np.asarray(taps, np.float64)
    kernel = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    return [
        f"{key} differs from the network's resample_filter {taps.tolist()}"
        for key, value in state_dict.items()
        if key.endswith(".resample_filter")
        and (value.shape != kernel.shape or not np.allclose(value, kernel, rtol=1e-3))
    ]
