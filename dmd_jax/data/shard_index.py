"""Where the records of an ArrayRecord shard lie, from the bytes at its end alone.

The format is that of Riegeli (its "records file format") with ArrayRecord's layout.proto in it: the
last 64 KiB hold a chunk that says where the index begins, and the index is a chunk of protocol
buffers, one for each chunk of records. Only plain, uncompressed chunks are read, as write_shards
leaves them; hashes are not checked here, for ArrayRecord itself checks them before it returns a
record.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 1 << 16  # bytes; a header of the file's structure interrupts each at its beginning
_BLOCK_HEADER, _CHUNK_HEADER = 24, 40
_SIMPLE, _UNCOMPRESSED = ord("r"), 0


class ShardIndex(NamedTuple):
    """Chunk i is at bytes starts[i] to starts[i + 1], and has the records from i * group on."""

    starts: np.ndarray  # int64 [chunks + 1]
    group: int  # records in each chunk but perhaps the last


def index_start(end: bytes, size: int) -> int:
    """Where the index of a shard begins, from its last BLOCK bytes.

    Args:
      size: of the shard, in bytes.

    Raises:
      ValueError: these are not the last bytes of a shard.
    """
    records = _records(end, size - BLOCK)
    start = _numbers(records[0]).get(1, -1) if records else -1
    if not 0 <= start <= size - BLOCK:
        raise ValueError(f"an index at {start}")
    return start


def read_index(index: bytes, start: int) -> ShardIndex:
    """The index of a shard, from the bytes between `index_start` and its last BLOCK bytes.

    Raises:
      ValueError: these are not the bytes of an index, or it is not plain.
    """
    _, *chunks = [_numbers(record) for record in _records(index, start)] or [{}]
    starts = np.array([*(chunk.get(1, -1) for chunk in chunks), start], np.int64)
    group = chunks[0].get(3, 0) if chunks else 1
    if (np.diff(starts) <= 0).any() or starts[0] < 0 or group < 1:
        raise ValueError("chunks out of order")
    return ShardIndex(starts, group)


def _records(content: bytes, start: int) -> list[bytes]:
    """The records of the chunk that begins at byte `start` of a file."""
    chunk = _without_block_headers(content, start)
    size, count = int.from_bytes(chunk[8:16], "little"), int.from_bytes(chunk[25:32], "little")
    data = chunk[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if chunk[24:25] != bytes([_SIMPLE]) or data[:1] != bytes([_UNCOMPRESSED]):
        raise ValueError("no plain chunk")
    taken, at = _varint(data, 1)
    begin, records = at + taken, []
    for _ in range(count):
        length, at = _varint(data, at)
        records.append(data[begin : begin + length])
        begin += length
    if begin > len(data):
        raise ValueError("a chunk that is cut off")
    return records


def _without_block_headers(content: bytes, start: int) -> bytes:
    parts, at = [], 0
    while at < len(content):
        inside = (start + at) % BLOCK
        until = at + BLOCK - inside
        parts.append(content[at + max(0, _BLOCK_HEADER - inside) : until])
        at = until
    return b"".join(parts)


def _numbers(message: bytes) -> dict[int, int]:
    """The whole numbers of a protocol buffer by their fields."""
    at, numbers = 0, {}
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 0:
            numbers[tag >> 3] = value
        elif tag & 7 == 2:  # as many bytes
            at += value
        else:
            raise ValueError(f"wire type {tag & 7}")
    return numbers


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            raise ValueError("a number that is cut off")
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 63 bits")
