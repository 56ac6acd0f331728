"""Folders of shards that the writer does not make."""

import dataclasses
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from dmd_jax.data.shards import ShardReader, write_shards
from dmd_jax.data.shards_metadata import metadata_sha256


def write_records(path: Path, records: list[bytes]) -> None:
    """A shard of these records and no label, as earlier versions wrote them."""
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def write_changed(folder: Path, metadata, out: Path, **changes) -> Path:
    """The records of a folder in another, as if they were of changed metadata."""
    reader = ShardReader(folder, metadata, metadata_sha256(folder))
    changed = dataclasses.replace(metadata, **changes)
    write_shards(out, changed, lambda start, stop: (reader[i] for i in range(start, stop)))
    return out
