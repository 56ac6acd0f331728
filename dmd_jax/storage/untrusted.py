"""JSON, arrays and zips of strangers: read whole, or refused before they fill the memory."""

from __future__ import annotations

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import in_bucket
from dmd_jax.storage.real_files import check_real_file

# A file may unpack to this many bytes whatever its size, and else to so many times its size:
# pictures and weights that are no bomb compress by less.
_ANY_SIZE = 64 << 20
_MOST_COMPRESSION = 100
# What JSON of `read_json` may have, and how many bytes it may take as Python objects, by a
# generous estimate: 1.3 million pairs of a name and a number, as ImageNet's labels are, fit.
LONGEST_JSON = 128 << 20
_LARGEST_TREE = 400 << 20
_BYTES_A_CONTAINER, _BYTES_AN_ITEM = 200, 48
# Their decoders give all of a block at once, however much that is.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_json(path: Path, expected: str, *, longest: int = LONGEST_JSON) -> Any:
    """The content of a JSON file on this host or in a bucket.

    Args:
      expected: what the file should be, for messages. longest: bytes that it may have.

    Raises:
      UserError: no such file or something in its place (`check_real_file`), too large, or no JSON.
    """
    check_real_file(path, expected)
    try:
        if in_bucket(path):
            content = path.read_bytes()
        else:
            with path.open("rb") as file:
                content = file.read(longest + 1)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {first_line(error)}; expected {expected}"
        ) from error
    if len(content) > longest:
        raise UserError(f"{path}: has more than {longest:,} bytes; expected {expected}")
    return parse_json(content, str(path), expected)


def parse_json(content: bytes, where: str, expected: str) -> Any:
    """The value of UTF-8 JSON; `where` and `expected` are for messages.

    Raises:
      UserError: no JSON, nested too deeply, or so many lists and objects that they fill the memory.
    """
    containers = content.count(b"[") + content.count(b"{")
    if containers * _BYTES_A_CONTAINER + content.count(b",") * _BYTES_AN_ITEM > _LARGEST_TREE:
        raise UserError(f"{where}: holds more lists and values than fit; expected {expected}")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise UserError(
            f"{where} cannot be read as JSON (nested too deeply); expected {expected}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{where} cannot be read as JSON ({first_line(error)}); expected {expected}"
        ) from error


def read_member(archive: zipfile.ZipFile, name: str, where: str, *, longest: int) -> bytes:
    """A member of a zip of at most `longest` bytes, whatever its header claims.

    Raises:
      UserError: longer, compressed in another way than deflate, or damaged.
    """
    try:
        info = archive.getinfo(name)
        _check_method(info, where)
        with archive.open(info) as stream:
            content = stream.read(longest + 1)
    except UserError:
        raise
    except Exception as error:  # bad checksum, encryption, zlib.error, …
        raise UserError(f"{where}: {name} cannot be read ({first_line(error)})") from error
    if len(content) > longest:
        raise UserError(f"{where}: {name} unpacks to more than {longest:,} bytes")
    return content


def read_npz(
    path: Path, expected: str, names: tuple[str, ...] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names; nothing in it is executed.

    Args:
      expected: what the file should be, for messages.
      names: of those to read, as far as they are there; None reads all.

    Raises:
      UserError: as `check_real_file`; no zip of plain arrays, damaged, or of more bytes than the
        file could hold.
    """
    check_real_file(path, expected)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_claims(path, archive.infolist())
            for name, info in members.items():
                if not info.filename.endswith(".npy"):
                    raise UserError(
                        f"{path}: holds {name!a}, which is no array; expected {expected}"
                    )
            wanted = [name for name in members if names is None or name in names]
            return {name: _read_array(archive, members[name], path) for name in wanted}
    except UserError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each raise their own on damaged bytes
        raise UserError(
            f"{path}: cannot be read as an .npz of plain arrays ({first_line(error)}); expected "
            f"{expected}"
        ) from error


def read_npy(path: Path, expected: str) -> np.ndarray:
    """The array of an .npy file; nothing in it is executed.

    Raises:
      UserError: as `check_real_file`; no plain array, damaged, or of more bytes than the file has.
    """
    check_real_file(path, expected)
    try:
        with path.open("rb") as stream:
            _check_header(stream, os.fstat(stream.fileno()).st_size, str(path))
            stream.seek(0)
            return np.lib.format.read_array(stream, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # NumPy raises several kinds on damaged bytes
        raise UserError(
            f"{path}: cannot be read as an .npy file ({first_line(error)}); expected {expected}"
        ) from error


def check_unpacked(claimed: int, path: Path) -> None:
    """Raises a UserError if a file claims to unpack to far more bytes than it has."""
    size = path.stat().st_size
    most = max(_ANY_SIZE, _MOST_COMPRESSION * size)
    if claimed > most:
        raise UserError(
            f"{path}: its arrays claim {claimed:,} bytes and the file has {size:,}; expected at "
            f"most {most:,}"
        )


def _check_claims(path: Path, members: list[zipfile.ZipInfo]) -> None:
    check_unpacked(sum(info.file_size for info in members), path)
    for info in members:
        _check_method(info, str(path))


def _check_method(info: zipfile.ZipInfo, where: str) -> None:
    if info.compress_type not in _METHODS:
        raise UserError(
            f"{where}: {info.filename} is compressed by method {info.compress_type}; expected "
            "deflate, or none"
        )


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with archive.open(info) as stream:
        _check_header(stream, info.file_size, f"{path}: {info.filename}")
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_header(stream: BinaryIO, size: int, where: str) -> None:
    """Raises a UserError unless the array that a header describes fills the `size` bytes."""
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = reader(stream)
    if dtype.hasobject:
        raise UserError(f"{where}: holds Python objects, expected plain numbers")
    claimed = math.prod(shape) * dtype.itemsize
    held = size - stream.tell()
    if claimed != held:
        raise UserError(
            f"{where}: its header claims {dtype} of shape {shape}, {claimed:,} bytes, and "
            f"{held:,} are there"
        )
