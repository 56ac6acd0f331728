"""Weights of one network on disk: a folder with config.json and model.safetensors.

A text-to-image folder is that of its UNet, with such a folder for each other network in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dmd_jax.errors import UserError, first_line
from dmd_jax.models import Denoiser, abstract_params, build_denoiser, complete
from dmd_jax.parallel.sharding import to_host
from dmd_jax.storage.bucket_copies import local_copy
from dmd_jax.storage.checkpoints import check_same_architecture, restore_subtree
from dmd_jax.storage.files import path_of
from dmd_jax.storage.real_files import answered, check_real_file, is_there
from dmd_jax.storage.safetensors_stream import write_safetensors
from dmd_jax.storage.seals import read_sealed, write_sealed

_LONGEST_CONFIG = 8 << 20  # bytes; the names of many classes take some
_DTYPES = ("F32", "BF16", "F16")
# In a run's workdir: the names of the classes that its weights get in their config.json.
CLASSES_FILE = "classes.json"
# Keys of config.objective that say how a generator is sampled, and their usual values.
_SAMPLING_KEYS = {"num_steps": 1, "sigma_init": None}
# The players that runs are for.
KEPT = ("generator", "teacher")


class Weights(NamedTuple):
    """A network and its parameters."""

    network: dict[str, Any]  # options for models.build_network
    params: Any  # nested dict of NumPy arrays
    description: str  # where they come from
    source: dict[str, str] | None = None  # "file" and "sha256" of what they were converted from
    # By label, None for one without a name; None as a whole where the training data have no names.
    class_names: tuple[str | None, ...] | None = None
    # How a generator is sampled that is not held at the schedule's last level for one step.
    generator: Mapping[str, float] = MappingProxyType({})


def packaged(name: str) -> Path:
    """The folder of weights that ship with dmd_jax."""
    return Path(__file__).parents[1] / "assets" / name


def save_weights(folder: Path, weights: Weights) -> None:
    """Writes model.safetensors (keys "a/b/c"), then config.json.

    Raises:
      UserError: the folder cannot be written.
    """
    flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
    save_leaves(folder, weights._replace(params=flat), flat.__getitem__)


def save_leaves(folder: Path, weights: Weights, leaf_of: Callable[[str], np.ndarray]) -> None:
    """As save_weights, leaf by leaf, so that the parameters never need be in memory together.

    Args:
      weights: its params are the leaves' shapes and types by their names, "a/b/c".
      leaf_of: is asked for each leaf once, in the order of the names.

    Raises:
      UserError: the folder cannot be written.
    """
    digest = hashlib.sha256()

    def hashed(name: str) -> np.ndarray:
        array = leaf_of(name)
        _add_leaf(digest, name, array)
        return array

    try:
        write_safetensors(folder / "model.safetensors", weights.params, hashed)
        config = {
            "network": weights.network,
            "description": weights.description,
            "params_sha256": digest.hexdigest(),
        }
        if weights.source is not None:
            config["source"] = weights.source
        if weights.class_names is not None:
            config["class_names"] = list(weights.class_names)
        if weights.generator:
            config["generator"] = dict(weights.generator)
        write_sealed(folder / "config.json", config)
    except OSError as error:
        raise UserError(f"weights could not be written to {folder}: {error}") from error


def save_from_devices(folder: Path, weights: Weights) -> None:
    """As save_weights, of parameters on the devices of all processes; the first process writes.

    Every process calls it. No more than one leaf at a time is put together, on the hosts.

    Raises:
      UserError: the folder cannot be written.
    """
    flat = flax.traverse_util.flatten_dict(weights.params, sep="/")
    if jax.process_index() == 0:
        leaf_of = lambda name: to_host(flat[name])  # noqa: E731
        save_leaves(folder, weights._replace(params=flat), leaf_of)
    else:
        for name in sorted(flat):  # the order in which the first process asks
            to_host(flat[name])


def save_class_names(workdir: Path, names: tuple[str | None, ...] | None) -> None:
    """Writes a run's classes.json, by which its checkpoints are weights with names as well.

    Args:
      names: by label; None writes nothing.

    Raises:
      UserError: it cannot be written, or the run began with other names.
    """
    if names is None:
        return
    path = workdir / CLASSES_FILE
    if answered(path.exists):
        if _read_json(path, needs="class_names")["class_names"] != list(names):
            raise UserError(
                f"{path}: the run began with other names of classes; expected the same data, or "
                "another --workdir"
            )
        return
    try:
        write_sealed(path, {"class_names": list(names)})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def load_weights(folder: Path, *, player: str | None = None) -> Weights:
    """Reads a weights folder, or the newest checkpoint of a run's workdir.

    A workdir gives the EMA where the run keeps one.

    Args:
      player: whose of a run, such as "fake_score"; by default those that the run is for.

    Raises:
      UserError: the folder is neither, cannot be read, or does not fit its own config.
    """
    folder = path_of(folder)
    return _load_workdir(folder, player) if _is_workdir(folder) else _load_folder(folder)


def network_of(folder: Path) -> dict[str, Any]:
    """The options of the network of a weights folder or a workdir, by its config alone.

    Raises:
      UserError: the folder is neither, or its config cannot be read.
    """
    folder = path_of(folder)
    is_workdir = _is_workdir(folder)
    config = _read_json(folder / "config.json", needs="config" if is_workdir else "network")
    return _network(config["config"] if is_workdir else config, folder)


def generator_of(folder: Path) -> dict[str, float]:
    """How the generator of a weights folder or a workdir is sampled, as Weights.generator.

    Raises:
      UserError: as network_of.
    """
    folder = path_of(folder)
    is_workdir = _is_workdir(folder)
    content = _read_json(folder / "config.json", needs="config" if is_workdir else "network")
    return _of_run(content, folder) if is_workdir else _of_folder(content, folder)


def sampling_of(objective: Mapping[str, Any]) -> dict[str, float]:
    """What config.objective says of how its generator is sampled, as Weights.generator."""
    return {
        key: objective[key]
        for key, usual in _SAMPLING_KEYS.items()
        if objective.get(key) is not None and objective[key] != usual
    }


def denoiser_of(weights: Weights, **options: str) -> Denoiser:
    """The network of the weights; `options` are build_denoiser's: dtype, precision and remat."""
    return build_denoiser(weights.network, **options)


def params_sha256(params: Any) -> str:
    """SHA-256 over the leaves in the order of their names: name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        _add_leaf(digest, name, leaf)
    return digest.hexdigest()


def _add_leaf(digest: hashlib._Hash, name: str, leaf: Any) -> None:
    array = np.asarray(leaf, order="C")
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)


def _is_workdir(folder: Path) -> bool:
    if not answered(folder.is_dir):
        raise UserError(f"weights {folder}: no such folder; expected a weights folder or a workdir")
    if answered(lambda: is_there(folder / "model.safetensors")):
        return False
    if not answered((folder / "checkpoints").is_dir):
        raise UserError(
            f"weights {folder}: expected model.safetensors and config.json, or a run's checkpoints/"
        )
    return True


def _network(config: Any, folder: Path) -> dict[str, Any]:
    network = config.get("network") if isinstance(config, dict) else None
    if not isinstance(network, dict):
        raise UserError(f"{folder / 'config.json'}: network is {network!r:.100}; expected options")
    return network


def _class_names(
    content: dict[str, Any], network: dict[str, Any], path: Path
) -> tuple[str | None, ...] | None:
    """The names that a JSON file gives the network's classes; None from a file without them."""
    names = content.get("class_names")
    if names is None:
        return None
    count = complete(network).get("label_dim", 0)
    if not isinstance(names, list) or not all(isinstance(one, str | None) for one in names):
        raise UserError(f"{path}: class_names is {names!r:.100}; expected a list of names")
    if len(names) != count:
        raise UserError(f"{path}: has {len(names)} class_names; expected {count}, one a class")
    return tuple(names)


def _of_run(content: dict[str, Any], folder: Path) -> dict[str, float]:
    """`sampling_of` of the objective of a run that distils; {} of a teacher's."""
    config = content["config"]
    objective = config.get("objective") if isinstance(config, dict) else None
    return {} if content.get("command") == "teacher" else _checked(objective or {}, folder)


def _of_folder(content: dict[str, Any], folder: Path) -> dict[str, float]:
    """What the config.json of a weights folder has of it."""
    return _checked(content.get("generator", {}), folder)


def _checked(found: Any, folder: Path) -> dict[str, float]:
    """`sampling_of` of a dict.

    Raises:
      UserError: something else than a dict of positive numbers.
    """
    if not isinstance(found, dict):
        path = folder / "config.json"
        raise UserError(f"{path}: generator is {found!r:.100}; expected a dict, as train writes it")
    found = sampling_of(found)
    for key, value in found.items():
        kind = int if key == "num_steps" else float
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < 1e6:
            path = folder / "config.json"
            raise UserError(f"{path}: {key} is {value!r:.100}; expected a positive number")
    return found


def _load_folder(folder: Path) -> Weights:
    config = _read_json(folder / "config.json", needs="network")
    network = _network(config, folder)
    expected = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
    flat = _read_leaves(folder, expected)
    recorded = config.get("params_sha256")
    if recorded is not None and recorded != params_sha256(flat):
        raise UserError(
            f"{folder / 'model.safetensors'} is damaged: its SHA-256 is not config.json's "
            f"params_sha256 {recorded!r:.100}"
        )
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    description = config.get("description", str(folder))
    names = _class_names(config, network, folder / "config.json")
    generator = _of_folder(config, folder)
    return Weights(network, params, description, config.get("source"), names, generator)


def _read_leaves(folder: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of model.safetensors by their names, "a/b/c".

    Args:
      expected: their shapes, by which the file's header is judged before an array is read.
    """
    path = folder / "model.safetensors"
    check_real_file(path, "arrays as `dmd-jax teacher`, `train` and `convert` write them")
    try:
        with safe_open(local_copy(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {
                name: jax.ShapeDtypeStruct(tuple(part.get_shape()), np.float32)
                for name, part in slices.items()
            }
            # Before they become a tree, which not all names can: no leaf "a" has "a/b" in it.
            check_same_architecture(shapes, expected, folder)
            for name, part in slices.items():
                if part.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} is {part.get_dtype()}; expected "
                        f"{' or '.join(_DTYPES)} (float32, bfloat16, float16)"
                    )
            return {name: file.get_tensor(name) for name in slices}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _load_workdir(folder: Path, player: str | None) -> Weights:
    content = _read_json(folder / "config.json", needs="config")
    config = content["config"]
    names = [place for one in (KEPT if player is None else (player,)) for place in _places(one)]
    found = restore_subtree(folder / "checkpoints", names)
    if found is None:
        of_player = "" if player is None else f" with a {player}"
        raise UserError(
            f"{folder / 'checkpoints'} holds no whole checkpoint{of_player}; expected one"
        )
    step, name, params = found
    network = _network(config, folder)
    check_same_architecture(params, abstract_params(network), folder)
    names = None
    if answered(lambda: is_there(folder / CLASSES_FILE)):
        of_classes = _read_json(folder / CLASSES_FILE, needs="class_names")
        names = _class_names(of_classes, network, folder / CLASSES_FILE)
    description = f"{folder} at step {step}, {name}"
    generator = _of_run(content, folder)
    return Weights(network, params, description, class_names=names, generator=generator)


def _places(player: str) -> list[str]:
    """Where a checkpoint may hold a player's parameters, best first."""
    # First where the player has a head beside its network. The last two in checkpoints that know no
    # players, whose average is the kept one's.
    average = ["ema"] if player in KEPT else []
    own = [f"players/{player}/{of}" for of in ("params/network", "ema", "params")]
    return [*own, *average, f"{player}/params"]


def _read_json(path: Path, *, needs: str) -> dict[str, Any]:
    content, _ = read_sealed(path, "a config of weights or of a run", longest=_LONGEST_CONFIG)
    if needs not in content:
        raise UserError(f"{path} holds no {needs!r}; expected a config of weights or of a run")
    return content
