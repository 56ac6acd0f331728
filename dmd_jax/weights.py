"""Weights of one network on disk: a folder with config.json and model.safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dmd_jax.checkpoints import check_same_architecture, restore_subtree
from dmd_jax.errors import UserError
from dmd_jax.files import replacing, write_json
from dmd_jax.models import Denoiser, build_denoiser

# Where a run's checkpoint holds the network that it is for, best first.
TRAINED = ("ema", "generator/params", "teacher/params")


class Weights(NamedTuple):
    """A network and its parameters."""

    network: dict[str, Any]  # options for models.build_denoiser
    params: Any  # nested dict of NumPy arrays
    description: str  # where they come from
    source: dict[str, str] | None = None  # "file" and "sha256" of what they were converted from


def packaged(name: str) -> Path:
    """The folder of weights that ship with dmd_jax."""
    return Path(__file__).parent / "assets" / name


def save_weights(folder: Path, weights: Weights) -> None:
    """Writes model.safetensors (keys "a/b/c"), then config.json.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
        with replacing(folder / "model.safetensors") as temporary:
            save_file({name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}, temporary)
        config = {
            "network": weights.network,
            "description": weights.description,
            "params_sha256": params_sha256(weights.params),
        }
        if weights.source is not None:
            config["source"] = weights.source
        write_json(folder / "config.json", config)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights could not be written to {folder}: {error}") from error


def load_weights(folder: Path) -> Weights:
    """Reads a weights folder, or the newest checkpoint of a run's workdir.

    A workdir gives the EMA where the run keeps one.

    Raises:
      UserError: the folder is neither, cannot be read, or does not fit its own config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"weights {folder}: no such folder; expected a weights folder or a workdir")
    if (folder / "model.safetensors").exists():
        weights = _load_folder(folder)
    elif (folder / "checkpoints").is_dir():
        weights = _load_workdir(folder)
    else:
        raise UserError(
            f"weights {folder}: expected model.safetensors and config.json, or a run's checkpoints/"
        )
    if not isinstance(weights.network, dict):
        raise UserError(
            f"{folder / 'config.json'}: network is {weights.network!r}; expected options"
        )
    expected = jax.eval_shape(build_denoiser(weights.network).init, jax.random.key(0))
    check_same_architecture(weights.params, expected, folder)
    return weights


def denoiser_of(weights: Weights, *, dtype: str = "float32") -> Denoiser:
    """The network of the weights."""
    return build_denoiser(weights.network, dtype=dtype)


def params_sha256(params: Any) -> str:
    """SHA-256 over the leaves in the order of their names: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load_folder(folder: Path) -> Weights:
    config = _read_json(folder / "config.json", needs="network")
    try:
        flat = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    recorded = config.get("params_sha256")
    if recorded is not None and recorded != params_sha256(params):
        raise UserError(
            f"{folder / 'model.safetensors'} is damaged: its SHA-256 is not config.json's "
            f"params_sha256 {recorded}"
        )
    description = config.get("description", str(folder))
    return Weights(config["network"], params, description, config.get("source"))


def _load_workdir(folder: Path) -> Weights:
    config = _read_json(folder / "config.json", needs="config")["config"]
    found = restore_subtree(folder / "checkpoints", TRAINED)
    if found is None:
        raise UserError(f"{folder / 'checkpoints'} holds no whole checkpoint; expected one")
    step, name, params = found
    return Weights(config.get("network"), params, f"{folder} at step {step}, {name}")


def _read_json(path: Path, *, needs: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or needs not in content:
        raise UserError(f"{path} holds no {needs!r}; expected a config of weights or of a run")
    return content
