"""The idx format of MNIST and its relatives: a big-endian header, then unsigned bytes.

Format: four bytes 0, 0, 8 (unsigned byte), number of dimensions; then each size as a big-endian
32-bit number; then the values, last dimension fastest (yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.untrusted import check_unpacked

_IMAGES = re.compile(r"(?P<prefix>.*)images(?P<sep>[-.])idx3-ubyte(?:\.gz)?")
_SPLITS = {"train": "train", "test": "t10k"}
_CHUNK_BYTES = 1 << 20


def is_images_file(path: Path) -> bool:
    """Whether the name is that of an idx image file, for example train-images-idx3-ubyte.gz."""
    return _IMAGES.fullmatch(path.name) is not None


def find_images(folder: Path, split: str) -> Path | None:
    """The image file of `split` ("train" or "test") under its standard name, if it is there."""
    for sep in "-.":
        found = _plain_or_gz(folder / f"{_SPLITS[split]}-images{sep}idx3-ubyte")
        if found is not None:
            return found
    return None


def find_labels(images: Path) -> Path | None:
    """The label file that lies beside an image file, if there is one."""
    parts = _IMAGES.fullmatch(images.name)
    return _plain_or_gz(images.with_name(f"{parts['prefix']}labels{parts['sep']}idx1-ubyte"))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads one idx file, plain or gzip by its name: uint8 of `ndim` dimensions.

    Raises UserError that names the file if it is unreadable, not idx, shorter or longer than its
    header says, or claims far more than it could hold.
    """
    check_real_file(path, "an idx file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            header = stream.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
                raise UserError(
                    f"{path}: no idx file of unsigned bytes with {ndim} dimensions (it begins "
                    f"with {header[:4].hex(' ')}, expected {bytes((0, 0, 8, ndim)).hex(' ')} "
                    "and the sizes)"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            check_unpacked(math.prod(shape), path)
            values = _read_at_most(stream, math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected an idx file") from error
    if len(values) != math.prod(shape):
        found = "more" if len(values) > math.prod(shape) else f"{len(values)}"
        raise UserError(
            f"{path}: holds {found} bytes of values, its header says {math.prod(shape)} {shape}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_at_most(stream, limit: int) -> bytearray:
    # Piece by piece: a damaged header may ask for far more than the file can hold, and a single
    # read would allocate that much first.
    values = bytearray()
    while limit > 0 and (piece := stream.read(min(limit, _CHUNK_BYTES))):
        values += piece
        limit -= len(piece)
    return values


def _plain_or_gz(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None
