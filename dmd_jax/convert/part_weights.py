"""The arrays of a model of diffusers or transformers: safetensors, in one file or in shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.given_folder import GivenFolder
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.safe_pickle import shown

# Stems of the files' names: of diffusers' networks, and of transformers'.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
# Of the same weights, best first.
_VARIANTS = ("", ".fp16")
_TYPES = ("F32", "F16", "BF16")


def weight_patterns(stem: str, variant: str = "") -> list[str]:
    """What the files of one variant, "" or ".fp16", may be called."""
    shards = f"{stem}*{variant}*" if variant else f"{stem}-?????-of-?????"
    return [*_names(stem, variant), f"{shards}.safetensors"]


def has_weights(folder: GivenFolder, stem: str) -> bool:
    """Whether there is safetensors of the best variant."""
    return any(folder.has(name) for name in _names(stem, _VARIANTS[0]))


def find_weights(folder: GivenFolder, stem: str) -> list[Path]:
    """The files with the part's weights; where these are shards, their index is the first.

    Raises:
      UserError: there are none, or an index that names anything but files of the folder.
    """
    for variant in _VARIANTS:
        single, index = _names(stem, variant)
        if folder.has(single):
            return [folder.file(single)]
        if folder.has(index):
            return _shards(folder, index)
    raise UserError(
        f"{folder.path} holds no safetensors (pickles such as .bin, which can run any code, are "
        f"not read); expected {_names(stem, '')[0]}, or shards with their index"
    )


def _names(stem: str, variant: str) -> tuple[str, str]:
    return f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"


def _shards(folder: GivenFolder, index: str) -> list[Path]:
    path = folder.file(index)
    weight_map = folder.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; expected the shards by the arrays' names")
    names = list(dict.fromkeys(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path} names {shown(name)}; expected .safetensors files of its own folder"
            )
    return [path, *map(folder.file, names)]


class Tensors:
    """The arrays of several files by their names; each is read when it is asked for.

    Args:
      files: as find_weights gives them.

    Raises:
      UserError: a file cannot be read or is damaged, or two have an array of one name.
    """

    def __init__(self, files: list[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for path in files:
            if path.suffix != ".json":
                self._read_header(path)

    def get(self, name: str) -> np.ndarray:
        """One array, of the file's own type.

        Raises:
          UserError: it cannot be read, or is no floating point of at most 32 bits.
        """
        path = self._files[name]
        if self._types[name] not in _TYPES:
            raise UserError(
                f"{path}: {name} has type {self._types[name]}; expected one of {', '.join(_TYPES)}"
            )
        try:
            # Opened anew, since what an open file has read so far counts as memory in use.
            with safe_open(path, framework="numpy") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error

    def _read_header(self, path: Path) -> None:
        check_real_file(path, "a file of safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    if shown(name) != name:  # it would be printed in a list of differences
                        raise UserError(
                            f"{path} has an array named {shown(name)}; expected a plain name"
                        )
                    if name in self._files:
                        raise UserError(f"{path}: {name} is in {self._files[name].name} too")
                    header = file.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self._types[name] = header.get_dtype()
                    self._files[name] = path
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}") from error
