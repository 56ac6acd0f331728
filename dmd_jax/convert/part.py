"""One network of a diffusers folder: its config.json and its arrays, checked against ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from dmd_jax.convert.diffusers_config import KINDS, network_from_config
from dmd_jax.convert.part_weights import Tensors, find_weights
from dmd_jax.convert.torch_layout import from_torch, torch_key, torch_shape
from dmd_jax.errors import UserError
from dmd_jax.models import abstract_params
from dmd_jax.storage.given_folder import GivenFolder
from dmd_jax.storage.strict import check_names_and_shapes

_CONFIG = "config.json"
# Of CLIP: a prefix that not all files have, and the buffer of 0, 1, 2, … that older ones have.
_PREFIX, _POSITIONS = "text_model.", "embeddings.position_ids"
# Of AutoencoderKL's attention, which older files name otherwise and keep as 1x1 convolutions.
_OLD_NAME = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A network, and where each of its parameters is."""

    network: dict[str, Any]  # complete (see models.complete)
    layout: dict[str, jax.ShapeDtypeStruct]  # of the parameters by their paths, "a/b/c"
    files: list[Path]  # all that it is read from
    keys: dict[str, str]  # of the file's arrays, by the parameters' paths
    tensors: Tensors

    @property
    def count(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in self.layout.values())

    def leaf(self, path: str) -> np.ndarray:
        """One parameter, float32.

        Raises:
          UserError: it cannot be read, is no floating point, or has a value that is not finite.
        """
        key = self.keys[path]
        array = self.tensors.get(key)
        array = from_torch(path, array.reshape(torch_shape(path, self.layout[path].shape)))
        if not np.isfinite(array).all():
            raise UserError(f"{self.files[-1].parent}: {key} has values that are not finite")
        return array


def read_part(
    folder: GivenFolder,
    class_name: str,
    stem: str,
    extra: Mapping[str, Any] | None = None,
) -> Part:
    """Reads the config and the headers of the weights; the arrays are read when asked for.

    Args:
      class_name: which of KINDS the config has to say it is of.
      stem: of the weights' names.
      extra: options of the network that the config does not hold.

    Raises:
      UserError: a file is missing or damaged, the config is of another class or not ours (see
        diffusers_config), or arrays are missing, extra or misshapen, all listed.
    """
    path, config = folder.file(_CONFIG), folder.json(_CONFIG)
    # diffusers writes the one, transformers the other.
    named = config.get("_class_name", config.get("architectures"))
    if named not in (class_name, [class_name]):
        raise UserError(
            f"{path}: its _class_name or architectures is not {class_name}; expected the class "
            "that model_index.json, or the option, says"
        )
    network = network_from_config(config, KINDS[class_name], str(path), extra)
    files = find_weights(folder, stem)
    tensors = Tensors(files)
    theirs: dict[str, str] = {}
    for key in tensors.shapes:
        name = _current_name(network["name"], key)
        if name in theirs:
            raise UserError(f"{files[0]} has {theirs[name]} and {key}; expected one of the two")
        if name is not None:
            theirs[name] = key

    layout = flax.traverse_util.flatten_dict(abstract_params(network), sep="/")
    paths = {torch_key(path): path for path in layout}
    expected = {key: torch_shape(path, layout[path].shape) for key, path in paths.items()}
    shapes = {name: tensors.shapes[key] for name, key in theirs.items()}
    if network["name"] == "autoencoder_kl":
        shapes = {name: _matrix(shape, expected.get(name)) for name, shape in shapes.items()}
    check_names_and_shapes(shapes, expected, f"{files[0]} does not fit {path}")
    keys = {paths[name]: key for name, key in theirs.items()}
    return Part(network, layout, [path, *files], keys, tensors)


def _current_name(network: str, key: str) -> str | None:
    """PyTorch's present key for one of a file; None for what is no parameter."""
    if network == "clip_text":
        key = key.removeprefix(_PREFIX)
        return None if key == _POSITIONS else key
    if network == "autoencoder_kl":
        return _OLD_NAME.sub(lambda match: _NAMES[match[0]], key)
    return key


def _matrix(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> tuple[int, ...]:
    is_matrix = expected is not None and len(expected) == 2
    return shape[:2] if is_matrix and shape[2:] == (1, 1) else shape
