"""What a folder of shards says of itself: its metadata.json."""

from __future__ import annotations

import dataclasses
import os
from typing import ClassVar, TypeVar

from dmd_jax.errors import UserError
from dmd_jax.storage.files import path_of
from dmd_jax.storage.seals import digest, read_sealed

METADATA_FILE = "metadata.json"
MAX_SHARDS = 100_000  # a shard's name has five digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedMetadata:
    """What a folder of shards says of itself; subclasses add what they hold.

    Raises UserError for impossible values.
    """

    KIND: ClassVar[str]  # what a record is one of, and the command that writes them
    FORMAT_VERSION: ClassVar[int] = 1
    MAY_LACK: ClassVar[tuple[str, ...]] = ()  # keys that not every folder of this version has

    count: int  # records in all shards
    shard_size: int  # records in each shard but perhaps the last
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        ok = self.format_version == self.FORMAT_VERSION
        self._require("format_version", ok, f"{self.FORMAT_VERSION}")
        self._require_whole(count=1, shard_size=1)
        ok, least = self.num_shards <= MAX_SHARDS, -(-self.count // MAX_SHARDS)
        self._require("shard_size", ok, f"at least {least} for {self.count} {self.KIND}")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            value = getattr(self, name)
            raise UserError(f"{self.KIND}: {name} is {value!r}, expected {expected}")

    def _require_whole(self, **least: int) -> None:
        for name, limit in least.items():
            ok = type(getattr(self, name)) is int and getattr(self, name) >= limit
            self._require(name, ok, f"a whole number of at least {limit}")

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard_name(self, shard: int) -> str:
        return f"{self.KIND}-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The numbers [start, stop) of the records in a shard."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.count)


Metadata = TypeVar("Metadata", bound=ShardedMetadata)


def read_metadata(folder: str | os.PathLike, *kinds: type[Metadata]) -> Metadata:
    """Reads a folder's metadata.json, as that of `kinds` whose keys it has.

    Raises UserError if it is missing, damaged or incomplete.
    """
    return read_with_digest(folder, *kinds)[0]


def read_with_digest(folder: str | os.PathLike, *kinds: type[Metadata]) -> tuple[Metadata, str]:
    """As `read_metadata`, and what `metadata_sha256` returns."""
    path = path_of(folder) / METADATA_FILE
    values, _ = read_sealed(path, f"a folder written by `{kinds[0].KIND}`")
    found = set(values)
    keys = {kind: {field.name for field in dataclasses.fields(kind)} for kind in kinds}
    kind = min(kinds, key=lambda kind: len(keys[kind] ^ found))  # the nearest, where none fits
    missing, unknown = keys[kind] - found - set(kind.MAY_LACK), found - keys[kind]
    if missing or unknown:
        raise UserError(f"{path}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
    try:
        return kind(**values), digest(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def metadata_sha256(folder: str | os.PathLike) -> str:
    """SHA-256 of what a folder's metadata.json says, whatever its spaces and the order of its keys.

    To be called once it has been written.
    """
    return digest(read_sealed(path_of(folder) / METADATA_FILE, "metadata of shards")[0])
