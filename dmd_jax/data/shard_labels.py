"""The label of a shard: its last record, which says which shard of which metadata.json it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

from dmd_jax.data.shard_stream import ShardStream
from dmd_jax.data.shards_metadata import METADATA_FILE, ShardedMetadata
from dmd_jax.errors import UserError

_LABEL = b"\0dmd_jax shard\n"  # a label's beginning, which no pair of floats and no prompt has


class Shard(NamedTuple):
    """Which records a shard holds, of which folder; and that is what its label says."""

    kind: str
    name: str
    start: int
    stop: int
    metadata_sha256: str

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> bytes:
        return _LABEL + json.dumps(self._asdict()).encode()


def shards_of(metadata: ShardedMetadata, metadata_sha256: str) -> list[Shard]:
    """All shards of a folder with this metadata.json."""
    kind, digest = metadata.KIND, metadata_sha256
    return [
        Shard(kind, metadata.shard_name(number), *metadata.shard_range(number), digest)
        for number in range(metadata.num_shards)
    ]


def count_records(
    reader: ArrayRecordReader | ShardStream, path: Path, shard: Shard
) -> tuple[int, bool]:
    """How many records of a shard can be read, its label left out, and whether it has one.

    A file without a whole index or last record, such as a truncated one, counts as 0. Closing the
    reader of such a file raises, so it is left to be closed when it is dropped.

    Args:
      path: for a message.

    Raises:
      UserError: it has another shard's label.
    """
    found = reader.num_records()
    try:
        (last,) = reader.read([found - 1]) if found else (b"",)
    except (RuntimeError, IndexError):
        return 0, False
    if not last.startswith(_LABEL):
        return found, False
    if last != shard.label:
        raise _mistaken(path, last, shard)
    return found - 1, True


def _mistaken(path: Path, label: bytes, expected: Shard) -> UserError:
    """The error for a shard that has another's label."""
    try:
        found = Shard(**json.loads(label.removeprefix(_LABEL)))
    except (ValueError, TypeError):
        return UserError(f"{path}: its label {label!r:.200} is none, expected {expected.label!r}")
    if found.metadata_sha256 != expected.metadata_sha256:
        return UserError(
            f"{path}: is {found.name!r:.100} of a folder with another {METADATA_FILE}, expected a "
            f"shard of this folder, and its {METADATA_FILE} as it was written"
        )
    return UserError(
        f"{path}: is {found.name!r:.100}, expected {expected.kind} {expected.start} to "
        f"{expected.stop - 1}: give it back its name, or delete it and run {expected.kind} again"
    )
