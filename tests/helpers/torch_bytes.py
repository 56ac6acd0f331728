"""Pickles and PyTorch files written byte by byte from their published formats, without PyTorch.

Nothing of dmd_jax is used here, so that what its readers read was made by somebody else.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
MAGIC = 0x1950A86A20F9469CFC6C


class Global(NamedTuple):
    """What a pickle writes for a class or a function."""

    module: str
    name: str


class Call(NamedTuple):
    """function(*args), then a state for what it returned, if there is one."""

    function: Global
    args: tuple
    state: Any = None
    new: bool = False  # by NEWOBJ rather than REDUCE


class PersistentId(NamedTuple):
    value: Any


class Tensor(NamedTuple):
    """A view of a flat array."""

    flat: np.ndarray
    offset: int
    size: tuple
    stride: tuple


def tensor(array) -> Tensor:
    """A contiguous tensor of an array."""
    steps = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
    return Tensor(array.reshape(-1), 0, array.shape, tuple(steps))


def dumps(value, protocol=3) -> bytes:
    file = io.BytesIO()
    dump(value, file, protocol)
    return file.getvalue()


def dump(value, file: BinaryIO, protocol=3) -> None:
    """Writes one pickle; repeated strings, globals and objects are memoised as Python does."""
    file.write(b"\x80" + bytes([protocol]))
    _Writer(file, protocol).write(value)
    file.write(b".")


class _Writer:
    def __init__(self, file, protocol):
        self.file, self.protocol, self.memo, self.kept, self.count = file, protocol, {}, [], 0

    def out(self, code, *packed):
        self.file.write(code + b"".join(packed))

    def remember(self, key=None, value=None):
        """Writes the opcode that memoises the top of the stack; notes under which key it is."""
        if self.protocol >= 4:
            self.out(b"\x94")
        else:
            self.numbered(b"q", b"r", self.count)
        if key is not None:
            self.memo[key] = self.count
            self.kept.append(value)  # so that its id stays its own
        self.count += 1

    def numbered(self, short, long, index):
        self.out(*((short, bytes([index])) if index < 256 else (long, struct.pack("<I", index))))

    def write(self, value):
        if callable(value):  # made only now, and forgotten when it is written
            value = value()
        if value is None or value is True or value is False:
            self.out({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out(b"G", struct.pack(">d", value))
        elif isinstance(value, PersistentId):
            self.write(value.value)
            self.out(b"Q")
        elif isinstance(value, Call):
            self.call(value)
        elif isinstance(value, bytes):
            self.bytes(value)
        elif isinstance(value, tuple) and not isinstance(value, Global):
            self.tuple(value)
        else:
            key = value if isinstance(value, str | Global) else id(value)
            if key in self.memo:
                self.numbered(b"h", b"j", self.memo[key])
            else:
                self.shared(value, key)

    def integer(self, value):
        if 0 <= value < 256:
            self.out(b"K", bytes([value]))
        elif -(2**31) <= value < 2**31:
            self.out(b"J", struct.pack("<i", value))
        else:
            length = value.bit_length() // 8 + 1
            self.out(b"\x8a", bytes([length]), value.to_bytes(length, "little", signed=True))

    def shared(self, value, key):
        """What Python writes once and refers to later."""
        if isinstance(value, Global):
            self.name(value)
            self.remember(key, value)
        elif isinstance(value, str):
            encoded = value.encode()
            self.out(b"X", struct.pack("<I", len(encoded)), encoded)
            self.remember(key, value)
        elif isinstance(value, OrderedDict):
            self.write(Global("collections", "OrderedDict"))
            self.out(b")R")
            self.items(value, key)
        elif isinstance(value, dict):
            self.out(b"}")
            self.items(value, key)
        elif isinstance(value, list):
            self.out(b"]")
            self.remember(key, value)
            self.out(b"(")
            for item in value:
                self.write(item)
            self.out(b"e")
        elif isinstance(value, set):
            self.set(value, key)
        else:
            raise TypeError(type(value))

    def call(self, value):
        self.write(value.function)
        self.write(value.args)
        self.out(b"\x81" if value.new else b"R")
        self.remember()
        if value.state is not None:
            self.write(value.state)
            self.out(b"b")

    def name(self, value):
        if self.protocol >= 4:
            self.write(value.module)
            self.write(value.name)
            self.out(b"\x93")
        else:
            self.out(b"c", f"{value.module}\n{value.name}\n".encode())

    def bytes(self, value):
        length = len(value)
        if length < 256:
            self.out(b"C", bytes([length]))
        elif length < 2**32:
            self.out(b"B", struct.pack("<I", length))
        else:
            self.out(b"\x8e", struct.pack("<Q", length))
        self.file.write(value)
        self.remember()

    def tuple(self, value):
        if len(value) > 3:
            self.out(b"(")
        for item in value:
            self.write(item)
        self.out({0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t"))
        if value:
            self.remember()

    def set(self, value, key):
        if self.protocol < 4:
            module = "builtins" if self.protocol == 3 else "__builtin__"
            self.write(Call(Global(module, "set"), (sorted(value),)))
            return
        self.out(b"\x8f")
        self.remember(key, value)
        self.out(b"(")
        for item in sorted(value):
            self.write(item)
        self.out(b"\x90")

    def items(self, value, key):
        self.remember(key, value)
        if value:
            self.out(b"(")
            for name, item in value.items():
                self.write(name)
                self.write(item)
            self.out(b"u")


def storage_id(flat, key, count=None) -> PersistentId:
    kind = Global("torch", STORAGES[flat.dtype.name])
    return PersistentId(("storage", kind, key, "cpu", len(flat) if count is None else count))


def rebuilt(value: Tensor, storage) -> Call:
    """The call that makes a tensor of its storage."""
    args = (storage, value.offset, value.size, value.stride, False, OrderedDict())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)


def legacy_storage(flat: np.ndarray) -> bytes:
    """A storage by itself, as the argument of torch.storage._load_from_bytes."""
    file = io.BytesIO()
    _legacy(file, PersistentId((*storage_id(flat, "94001").value, None)), {"94001": flat})
    return file.getvalue()


def legacy_file(tensors: dict[str, Tensor]) -> bytes:
    """A state dict as torch.save wrote it before 1.6; tensors of one flat array share a storage."""
    file = io.BytesIO()
    state, storages = _state(tensors, legacy=True)
    _legacy(file, state, storages)
    return file.getvalue()


def zip_file(tensors: dict[str, Tensor], folder="archive") -> bytes:
    """A state dict as torch.save writes it today."""
    file = io.BytesIO()
    state, storages = _state(tensors, legacy=False)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", dumps(state, 2))
        archive.writestr(f"{folder}/byteorder", "little")
        for key, flat in storages.items():
            archive.writestr(f"{folder}/data/{key}", flat.tobytes())
        archive.writestr(f"{folder}/version", "3\n")
    return file.getvalue()


def _state(tensors, legacy):
    storages, state = {}, OrderedDict()
    for name, value in tensors.items():
        key = next((k for k, flat in storages.items() if flat is value.flat), str(len(storages)))
        storages[key] = value.flat
        identity = storage_id(value.flat, key).value + ((None,) if legacy else ())
        state[name] = rebuilt(value, PersistentId(identity))
    return state, storages


def _legacy(file, value, storages):
    sizes = {"short": 2, "int": 4, "long": 4}
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
    for part in (MAGIC, 1001, machine, value, sorted(storages)):
        dump(part, file, 2)
    for key in sorted(storages):
        file.write(struct.pack("<q", len(storages[key])) + storages[key].tobytes())
