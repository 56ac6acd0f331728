"""`dmd-jax convert edm`: EDM's checkpoints, with NumPy alone, into a weights folder."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dmd_jax.config import load_config
from dmd_jax.convert.edm_pickle import CLASS, read_edm_pickle
from dmd_jax.convert.safe_pickle import shown
from dmd_jax.convert.strict import check_floating, check_names_and_shapes
from dmd_jax.convert.torch_file import load_state_dict
from dmd_jax.errors import UserError, first_line
from dmd_jax.files import file_sha256
from dmd_jax.metrics import Progress
from dmd_jax.models import build_denoiser, complete
from dmd_jax.weights import Weights, save_weights

_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "dhariwal"}
# Of EDMPrecond's keyword arguments, those that do not change what the network computes when it
# denoises: they concern training or choose a precision.
_IRRELEVANT = ("label_dropout", "use_fp16")
# Those that would clamp the noise levels of a sampler, and the values at which they do not.
_UNCLAMPED = {"sigma_min": (0, None), "sigma_max": (math.inf, None)}
_SECONDS_BETWEEN_UPDATES = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a released .pkl; or a state dict, .npz, .safetensors or .pth",
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the weights folder to make")
    parser.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="whose config.network a state dict is of, where the file has no 'kwargs' of its own",
    )


def run(args: argparse.Namespace) -> None:
    if not args.source.is_file():
        raise UserError(f"{args.source}: no such file; expected a checkpoint of EDM's")
    try:
        sha256 = file_sha256(args.source)
    except OSError as error:
        raise UserError(f"{args.source} cannot be read: {first_line(error)}") from error
    out = args.out.resolve()
    converted = _converted(out, sha256)
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
    if converted is not None:
        if converted != complete(network):
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
    _save(out, Weights(network, params, description, source))
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
    template = jax.eval_shape(build_denoiser(network).init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_their_key(path): _their_shape(leaf.shape) for path, leaf in leaves}
    found = {key: value.shape for key, value in state_dict.items() if not _is_filter(key)}
    check_names_and_shapes(found, expected, "EDM state dict does not fit the network")
    check_floating(state_dict, "EDM state dict")
    _check_filters(state_dict, network.get("resample_filter", (1, 1)))

    take = state_dict.pop if consume else state_dict.__getitem__
    meter = Progress("convert", sum(leaf.size for _, leaf in leaves), unit="parameters")
    arrays, done, updated = [], 0, time.monotonic()
    for key in expected:
        arrays.append(_our_array(take(key)))
        done += arrays[-1].size
        if progress and time.monotonic() - updated > _SECONDS_BETWEEN_UPDATES:
            meter.update(done)
            updated = time.monotonic()
    return jax.tree_util.tree_unflatten(structure, arrays)


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


def _converted(out: Path, sha256: str) -> dict[str, Any] | None:
    """The complete network of the folder, where it holds this very source, converted.

    None: the folder is new or empty. Another content is refused.
    """
    if not out.exists():
        return None
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if config["source"]["sha256"] == sha256 and (out / "model.safetensors").is_file():
            return complete(config["network"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass
    if out.is_dir() and not any(out.iterdir()):
        return None
    raise UserError(f"{out} exists and holds something else; expected a new or empty folder")


def _save(out: Path, weights: Weights) -> None:
    """The folder appears whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    try:
        save_weights(temporary, weights)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    return np.array(array, dtype=np.float32, order="C")


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
