"""Writes a .safetensors file array by array, so that no two of them need be in memory.

The format: the length of a header, as eight bytes; the header, JSON that gives each array's type,
shape and place in what follows; then the arrays' bytes, little-endian, in that order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.storage.files import replacing

_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_ALIGNMENT = 8


class Laid(Protocol):
    """What says how an array lies: an array itself, or a ShapeDtypeStruct."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


def write_safetensors(
    path: Path,
    layout: Mapping[str, Laid],
    array_of: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the file whole or not at all.

    Args:
      layout: the arrays' types and shapes by their names.
      array_of: is asked for each array once, in the order of the names, and has to give it as
        `layout` says; one is held at a time.
      metadata: of the header.

    Raises:
      UserError: a type that the format does not have.
      ValueError: array_of gave another type or shape.
      OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in sorted(layout):
        dtype, shape = np.dtype(layout[name].dtype), tuple(layout[name].shape)
        if dtype.name not in _TYPES:
            raise UserError(f"{name} has type {dtype.name}; expected one of {', '.join(_TYPES)}")
        end = start + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _TYPES[dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in sorted(layout):
            array = np.asarray(array_of(name))
            asked = np.dtype(layout[name].dtype), tuple(layout[name].shape)
            if (array.dtype, array.shape) != asked:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; {asked} was announced")
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
