"""`dmd-jax convert edm`: EDM's checkpoints, with NumPy alone, into a weights folder."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dmd_jax.config import load_config
from dmd_jax.convert.edm_pickle import CLASS, read_edm_pickle
from dmd_jax.convert.meter import Meter
from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.convert.torch_layout import from_torch, torch_key, torch_shape
from dmd_jax.convert.whole_folder import converted, resolved, whole_folder
from dmd_jax.errors import UserError, first_line
from dmd_jax.models import abstract_params, build_denoiser, complete
from dmd_jax.storage.files import file_sha256, local_path
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.safe_pickle import shown
from dmd_jax.storage.strict import check_floating, check_names_and_shapes
from dmd_jax.storage.weights import Weights, save_weights

_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "dhariwal"}
# Of EDMPrecond's keyword arguments, those that do not change what the network computes when it
# denoises: they concern training or choose a precision.
_IRRELEVANT = ("label_dropout", "use_fp16")
# Those that would clamp the noise levels of a sampler, and the values at which they do not.
_UNCLAMPED = {"sigma_min": (0, None), "sigma_max": (math.inf, None)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=local_path,
        metavar="SRC",
        help="a released .pkl; or a state dict, .npz, .safetensors or .pth",
    )
    parser.add_argument(
        "out", type=local_path, metavar="OUT_DIR", help="the weights folder to make"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="whose config.network a state dict is of, where the file has no 'kwargs' of its own",
    )


def run(args: argparse.Namespace) -> None:
    check_real_file(args.source, "a checkpoint of EDM's")
    try:
        sha256 = file_sha256(args.source)
    except OSError as error:
        raise UserError(f"{args.source} cannot be read: {first_line(error)}") from error
    out = resolved(args.out)
    present = converted(out, sha256)
    if args.source.suffix == ".pkl":
        kwargs, state_dict = read_edm_pickle(args.source)
    else:
        state_dict = load_state_dict(args.source)
        kwargs = _stored_kwargs(args.source, state_dict)
    if args.config is not None and kwargs is not None:
        raise UserError(f"--config {args.config}: {args.source} says itself what its network is")
    if args.config is None and kwargs is None:
        raise UserError(
            f"{args.source} does not say what its network is; expected 'kwargs' in it, or --config"
        )
    if kwargs is not None:
        network = network_from_init_kwargs(kwargs)
    else:
        network = load_config(args.config, args.overrides).network.to_dict()
    if present is not None:
        if present != complete(network):
            raise UserError(
                f"{args.out} holds {args.source.name} as another network; expected the same "
                "--config, or a new or empty folder"
            )
        print(f"convert: {args.out} holds {args.source.name} already")
        return
    params = params_from_state_dict(state_dict, network, consume=True, progress=True)
    source = {"file": args.source.name, "sha256": sha256}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    description = f"{args.source.name}, converted from EDM"
    with whole_folder(out) as folder:
        save_weights(folder, Weights(network, params, description, source))
    print(f"convert: {network['name']}, {count:,} parameters in {args.out}")


def network_from_init_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The complete `network` mapping (see models.complete) of an EDMPrecond's keyword arguments.

    Raises:
      UserError: another network than SongUNet or DhariwalUNet, no img_channels, or an argument that
        is unknown or of a value that no network of ours has.
    """
    options = {key: value for key, value in kwargs.items() if key not in _IRRELEVANT}
    for key, values in _UNCLAMPED.items():
        value = options.pop(key, None)
        if value not in values:
            raise UserError(f"EDM {key} is {shown(value)}; expected {values[0]}, its default")
    model_type = options.pop("model_type", "DhariwalUNet")  # EDMPrecond's own default
    if not isinstance(model_type, str) or model_type not in _NETWORKS:
        raise UserError(
            f"EDM model_type is {shown(model_type)}; expected one of {', '.join(_NETWORKS)}"
        )
    if "img_channels" not in options:
        raise UserError("EDM keyword arguments lack img_channels; expected the image's channels")
    channels = options.pop("img_channels")
    sizes = {"in_channels": channels, "out_channels": channels}
    network = complete({"name": _NETWORKS[model_type]} | sizes | options)
    build_denoiser(network)
    return network


def params_from_state_dict(
    state_dict: dict[str, np.ndarray],
    network: Mapping[str, Any],
    *,
    consume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """The parameters of `network` from an EDMPrecond state dict.

    Left out are the `resample_filter` buffers, which are the network's option of that name and are
    compared with it.

    Args:
      state_dict: keys "model....", PyTorch's layouts (OIHW, [out, in]), any floating dtype.
      network: "name": "songunet" or "dhariwal" and its options, as for build_denoiser.
      consume: empties the state dict on the way, so that no two copies of all parameters exist.
      progress: shows how far it is.

    Returns:
      A nested dict of float32 NumPy arrays.

    Raises:
      UserError: keys that are missing, unexpected or of another shape, all listed; integers.
    """
    if network.get("name") not in _NETWORKS.values():
        raise UserError(
            f"network name is {network.get('name')!r}; "
            f"expected one of {', '.join(_NETWORKS.values())}"
        )
    template = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
    paths = {_their_key(path): path for path in template}
    expected = {key: torch_shape(path, template[path].shape) for key, path in paths.items()}
    found = {key: value.shape for key, value in state_dict.items() if not _is_filter(key)}
    check_names_and_shapes(found, expected, "EDM state dict does not fit the network")
    check_floating(state_dict, "EDM state dict")
    _check_filters(state_dict, network.get("resample_filter", (1, 1)))

    take = state_dict.pop if consume else state_dict.__getitem__
    meter = Meter(sum(leaf.size for leaf in template.values()), enabled=progress)
    leaf_of = meter.watching(lambda key: from_torch(paths[key], take(key)))
    flat = {paths[key]: leaf_of(key) for key in expected}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _stored_kwargs(path: Path, state_dict: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Takes "kwargs", JSON, out of an .npz; or reads them in a .safetensors' metadata."""
    text = None
    if path.suffix == ".npz" and "kwargs" in state_dict:
        text = str(state_dict.pop("kwargs"))
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get("kwargs")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if text is None:
        return None
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its kwargs are no JSON ({first_line(error)})") from error
    if not isinstance(kwargs, dict):
        raise UserError(f"{path}: its kwargs are no JSON object; expected {CLASS}'s arguments")
    return kwargs


def _their_key(path: str) -> str:
    # Ours: enc_32x32_block0/conv0/kernel. EDM's: model.enc.32x32_block0.conv0.weight.
    if path.startswith(("enc_", "dec_")):
        path = path.replace("_", "/", 1)
    return "model." + torch_key(path)


def _is_filter(key: str) -> bool:
    return key.endswith(".resample_filter")


def _check_filters(state_dict: Mapping[str, np.ndarray], taps) -> None:
    taps = np.asarray(taps, np.float64)
    kernel = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    for key, value in state_dict.items():
        if _is_filter(key) and not (
            value.shape == kernel.shape and np.allclose(value, kernel, rtol=1e-3)
        ):
            raise UserError(
                f"EDM state dict: {key} differs from the network's resample_filter {taps.tolist()}"
            )
