"""State dicts from files: PyTorch's .pth and .pt, .npz and .safetensors, with NumPy alone."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dmd_jax.convert.torch_tensors import TENSORS, Storages, Tensor, arrays_of, read_legacy
from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.safe_pickle import load, shown
from dmd_jax.storage.untrusted import read_npz


def load_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file by their keys, as they lie there: layouts and dtypes are kept.

    Args:
      path: .npz and .safetensors by their suffix; anything else is PyTorch's, the zip format or the
        one before it: a dictionary whose values are all tensors. Nothing in it is executed.

    Returns:
      key -> array. PyTorch's bfloat16 is NumPy's "bfloat16" of ml_dtypes.

    Raises:
      UserError: the file cannot be read, is damaged, holds anything else, or claims arrays far
        larger than it could hold.
    """
    path = Path(path)
    check_real_file(path, "a file of arrays: .npz, .safetensors or PyTorch's")
    try:
        if path.suffix == ".npz":
            found = read_npz(path, "an .npz of arrays")
        elif path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = _read_torch(path)
        for name in found:
            if shown(name) != name:  # it would be printed in a list of differences
                raise UserError(f"{path} has an array named {shown(name)}; expected a plain name")
        return found
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    except Exception as error:  # NumPy, zipfile and zlib each raise their own on damaged bytes
        raise UserError(
            f"{path} is damaged, or no state dict ({type(error).__name__}: {first_line(error)})"
        ) from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    expected = "expected a dictionary of tensors by their names (a state dict)"
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        found = _read_zip(path) if is_zip else read_legacy(file, str(path))
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds {shown(found)}; {expected}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} holds {shown(value)} as {shown(key)}; {expected}")
    return arrays_of(found)


def _read_zip(path: Path) -> Any:
    """The object of PyTorch's zip format: NAME/data.pkl, and NAME/data/KEY for each storage."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip without a data.pkl; expected a file of PyTorch's")
        if sum(info.file_size for info in members.values()) > path.stat().st_size:
            raise UserError(f"{path}: its parts claim more bytes than it has")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in members and archive.read(folder + "byteorder") != b"little":
            raise UserError(f"{path}: written by a big-endian machine; expected little-endian")
        storages = Storages()
        content = archive.read(pickles[0])
        found = load(content, allowed=TENSORS, where=str(path), persistent_load=storages)
        for key, storage in storages.items():
            part = members.get(f"{folder}data/{key}")
            length = storage.count * storage.dtype.itemsize
            if part is None or part.file_size != length:
                size = "none" if part is None else f"one of {part.file_size:,} bytes"
                raise UserError(
                    f"{path}: storage {shown(key)} of {length:,} bytes is expected; found {size}"
                )
            storage.content = archive.read(part)
    return found
