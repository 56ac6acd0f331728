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
_MAGIC = 0x71930E704FDAE05E
# Protocol buffers have a tag before each number: its field, and 0 for the kind of it.
_FIELDS = (1 << 3, 2 << 3, 3 << 3)


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
    sizes, records = _records(end, size - BLOCK)
    tag, start, *rest = [*_varints(records[: sizes[0]]).tolist(), 0] if len(sizes) else [0, 0]
    if tag != _FIELDS[0] or rest[:2] != [_FIELDS[1], _MAGIC] or start > size - BLOCK:
        raise ValueError("no place of an index")
    return start


def read_index(index: bytes, start: int) -> ShardIndex:
    """The index of a shard, from the bytes between `index_start` and its last BLOCK bytes.

    Raises:
      ValueError: these are not the bytes of an index, or it is not plain.
    """
    sizes, records = _records(index, start)
    if not len(sizes):
        raise ValueError("an index without its head")
    numbers = _varints(records[sizes[0] :])
    chunks = len(sizes) - 1
    if len(numbers) != 2 * len(_FIELDS) * chunks:
        raise ValueError("chunks of an unknown kind")
    numbers = numbers.reshape(chunks, len(_FIELDS), 2)  # of each field its tag and its value
    starts = np.append(numbers[:, 0, 1], start)
    group = int(numbers[0, 2, 1]) if chunks else 1
    if (numbers[..., 0] != _FIELDS).any() or (np.diff(starts) <= 0).any() or group < 1:
        raise ValueError("chunks of an unknown kind or out of order")
    return ShardIndex(starts, group)


def _records(content: bytes, start: int) -> tuple[np.ndarray, bytes]:
    """The sizes of the records of the chunk that begins at byte `start` of a file, and the records.

    Raises:
      ValueError: it is compressed or cut off.
    """
    chunk = _without_block_headers(content, start)
    size, count = int.from_bytes(chunk[8:16], "little"), int.from_bytes(chunk[25:32], "little")
    data = chunk[_CHUNK_HEADER : _CHUNK_HEADER + size]
    if chunk[24:25] != bytes([_SIMPLE]) or data[:1] != bytes([_UNCOMPRESSED]):
        raise ValueError("no plain chunk")
    first = next((at for at in range(1, len(data)) if data[at] < 128), 0) + 1
    (taken,) = _varints(data[1:first]).tolist() or [0]
    sizes, records = _varints(data[first : first + taken]), data[first + taken :]
    if len(sizes) != count or sum(sizes.tolist()) != len(records):
        raise ValueError("a chunk that is cut off")
    return sizes, records


def _without_block_headers(content: bytes, start: int) -> bytes:
    parts, at = [], 0
    while at < len(content):
        inside = (start + at) % BLOCK
        until = at + BLOCK - inside
        parts.append(content[at + max(0, _BLOCK_HEADER - inside) : until])
        at = until
    return b"".join(parts)


def _varints(data: bytes) -> np.ndarray:
    """The numbers of seven bits a byte, the lowest first, of which all these bytes are: int64.

    Raises:
      ValueError: one is cut off, or has more than 63 bits.
    """
    content = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(content < 128)
    begins = np.append(0, ends + 1)
    if begins[-1] != len(content):
        raise ValueError("a number that is cut off")
    lengths = np.diff(begins)
    if (lengths > 9).any():
        raise ValueError("a number of more than 63 bits")
    numbers = np.zeros(len(ends), np.int64)
    for byte in range(max(lengths, default=0)):
        longer = lengths > byte
        part = content[begins[:-1][longer] + byte] & 127
        numbers[longer] |= part.astype(np.int64) << 7 * byte
    return numbers
