"""PyTorch's tensors as they lie in pickles, and its legacy file format, with NumPy alone.

A tensor is a view (offset, size and stride, in elements) of a flat storage. In the legacy format,
which torch.save wrote by default before 1.6 and in which the storages inside EDM's pickles are
kept, five pickles follow each other: a magic number, a version, the machine, the object and the
keys of its storages; then come each storage's length and bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.storage.safe_pickle import CONTAINERS, load, shown

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MOST_DIMENSIONS = 16
_LARGEST_EMPTY = 2**31  # the product of the other axes, in which NumPy must not overflow
_LARGEST = 2**63
_MOST_USES = 4  # of a storage's elements on average: weights that are tied have two or three names

_STORAGE_TYPES = {
    ("torch", f"{name}Storage"): np.dtype(dtype).newbyteorder("<")
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": jnp.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}


@dataclasses.dataclass
class Storage:
    """A flat array; its bytes may come later than the tensors that are cut from it."""

    dtype: np.dtype
    count: int  # of elements
    content: Any = None  # a bytes-like object of count * itemsize bytes


@dataclasses.dataclass
class Tensor:
    """A view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The values [*size], contiguous; without a copy where the view is contiguous itself."""
        step = self.storage.dtype.itemsize
        strides = tuple(step * each for each in self.stride)
        view = np.ndarray(
            self.size, self.storage.dtype, self.storage.content, step * self.offset, strides
        )
        return np.ascontiguousarray(view).reshape(self.size)  # which would make a scalar [1]


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The tensors' arrays, by the same names.

    Raises:
      ValueError: all together have many times the bytes of their storages, of which each view
        that is not contiguous would be a copy.
    """
    storages = {id(each.storage): each.storage for each in tensors.values()}
    held = sum(each.count * each.dtype.itemsize for each in storages.values())
    wanted = sum(math.prod(each.size) * each.storage.dtype.itemsize for each in tensors.values())
    if wanted > _MOST_USES * held:
        raise ValueError(f"tensors of {wanted:,} bytes in storages of {held:,}")
    return {name: tensor.array() for name, tensor in tensors.items()}


def _rebuild_tensor(storage, offset, size, stride, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2; what follows concerns gradients.

    Raises:
      ValueError: a view that leaves its storage, or that has more elements than it.
    """
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    if not (isinstance(size, tuple) and isinstance(stride, tuple)) or len(size) != len(stride):
        raise ValueError("a tensor whose size and stride do not fit")
    if len(size) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(size)} dimensions")
    numbers = (offset, *size, *stride)
    if any(type(each) is not int or not 0 <= each < _LARGEST for each in numbers):
        raise ValueError("a tensor with a negative size, stride or offset, or one beyond 63 bits")
    if 0 in size:  # no element is ever looked up
        if math.prod(filter(None, size)) > _LARGEST_EMPTY:
            raise ValueError("an empty tensor of a size that no array has")
        offset, stride = 0, (0,) * len(size)
    # Nor is the step used along an axis of one element; it may be any number.
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) > storage.count or (0 not in size and last >= storage.count):
        raise ValueError(f"a tensor that reaches beyond its storage of {storage.count:,} elements")
    return Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_parameter; what follows concerns gradients."""
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter without a tensor")
    return tensor


# What a dictionary of tensors needs.
TENSORS = {
    **CONTAINERS,
    **_STORAGE_TYPES,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class Storages(dict):
    """The storages that a pickle names, by key; called with a persistent id, gives its storage."""

    def __call__(self, identity: Any) -> Storage:
        """("storage", type, key, device, number of elements[, view]) -> Storage.

        Raises:
          ValueError: an id of another form.
        """
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise ValueError("a persistent id that is no storage's")
        tag, dtype, key, _, count = identity[:5]
        known = any(dtype is each for each in _STORAGE_TYPES.values())
        if tag != "storage" or not known or not isinstance(key, str):
            raise ValueError("a persistent id that is no storage's")
        if type(count) is not int or count < 0:
            raise ValueError("a storage of a negative size")
        if identity[5:] not in ((), (None,)):
            raise ValueError("a storage that is a view, as PyTorch wrote before 0.4")
        found = self.setdefault(key, Storage(dtype, count))
        if (found.dtype, found.count) != (dtype, count):
            raise ValueError(f"two storages with the key {shown(key)}")
        return found


def read_legacy(content: BinaryIO | bytes, where: str) -> Any:
    """The object of a legacy file: nested containers of Tensors, or a Storage.

    Args:
      content: a seekable stream, whose storages are read; or bytes, of which they are views.

    Raises:
      UserError: another format, an unknown version, big-endian, damage, or anything in the pickles
        but tensors.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    if load(stream, allowed={}, where=where) != _MAGIC:
        raise UserError(f"{where}: not a file of PyTorch's; expected its magic number first")
    version = load(stream, allowed={}, where=where)
    if version != _VERSION:
        raise UserError(f"{where}: PyTorch format version {shown(version)}; expected {_VERSION}")
    machine = load(stream, allowed={}, where=where)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError(f"{where}: written by a big-endian machine; expected little-endian")
    storages = Storages()
    found = load(stream, allowed=TENSORS, where=where, persistent_load=storages)
    keys = load(stream, allowed={}, where=where)
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        raise UserError(f"{where}: the storages that follow are not those that its tensors name")
    for key in keys:
        _read_storage(stream, content, storages[key], f"{where}: storage {shown(key)}")
    return found


def _read_storage(stream: BinaryIO, content: BinaryIO | bytes, storage: Storage, where: str):
    start = stream.tell() + 8
    left = stream.seek(0, io.SEEK_END) - start
    stream.seek(start - 8)
    count = int.from_bytes(stream.read(8), "little", signed=True)
    if count != storage.count:
        raise UserError(f"{where} has {count:,} elements; expected {storage.count:,}")
    length = count * storage.dtype.itemsize
    if length > left:
        raise UserError(f"{where} is cut short: {length:,} bytes expected, {max(left, 0):,} left")
    if isinstance(content, bytes):
        storage.content = memoryview(content)[start : start + length]
        stream.seek(start + length)
    else:
        storage.content = stream.read(length)
