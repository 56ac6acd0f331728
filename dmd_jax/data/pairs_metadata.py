"""What a folder of noise-image pairs says of itself: its metadata.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np

from dmd_jax.errors import UserError

METADATA_FILE = "metadata.json"
FORMAT_VERSION = 1
MAX_SHARDS = 100_000  # a shard's name has five digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsMetadata:
    """What a folder of pairs holds and how it was made. Raises UserError for impossible values."""

    teacher: str  # where the teacher's weights came from, in words or as a path
    teacher_sha256: str
    sampler: str
    num_steps: int
    guidance: float  # classifier-free guidance scale, 1 for none
    seed: int
    count: int  # pairs in all shards
    shard_size: int  # pairs in each shard but perhaps the last
    sample_shape: tuple[int, ...]  # (H, W, C)
    num_classes: int  # 0: no labels, and every label is 0
    dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        def require(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise UserError(f"pairs: {name} is {getattr(self, name)!r}, expected {expected}")

        require("format_version", self.format_version == FORMAT_VERSION, f"{FORMAT_VERSION}")
        require("dtype", self.dtype == "float32", "'float32'")
        for name in ("teacher", "teacher_sha256", "sampler"):
            require(name, isinstance(getattr(self, name), str), "text")
        for name, least in dict(num_steps=1, seed=0, count=1, shard_size=1, num_classes=0).items():
            ok = type(getattr(self, name)) is int and getattr(self, name) >= least
            require(name, ok, f"a whole number of at least {least}")
        ok = type(self.guidance) in (int, float) and math.isfinite(self.guidance)
        require("guidance", ok, "a finite number")
        ok = isinstance(self.sample_shape, (tuple, list)) and len(self.sample_shape) > 0
        ok = ok and all(type(size) is int and size > 0 for size in self.sample_shape)
        require("sample_shape", ok, "positive whole numbers [H, W, C]")
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))
        ok = self.num_shards <= MAX_SHARDS
        require("shard_size", ok, f"at least {-(-self.count // MAX_SHARDS)} for {self.count} pairs")

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    @property
    def record_dtype(self) -> np.dtype:
        """The layout of one record; packed, so that its itemsize is the record's length."""
        return np.dtype(
            [
                ("z_ref", "<f4", self.sample_shape),
                ("y_ref", "<f4", self.sample_shape),
                ("label", "<i4"),
            ]
        )

    def shard_name(self, shard: int) -> str:
        return f"pairs-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def shard_range(self, shard: int) -> tuple[int, int]:
        """The numbers [start, stop) of the pairs in a shard."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.count)


def read_metadata(folder: str | os.PathLike) -> PairsMetadata:
    """Reads a folder's metadata.json. Raises UserError if it is missing, damaged or incomplete."""
    path = Path(folder) / METADATA_FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected a folder written by `pairs`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    names = {field.name for field in dataclasses.fields(PairsMetadata)}
    if not isinstance(values, dict) or set(values) != names:
        found = set(values) if isinstance(values, dict) else set()
        raise UserError(
            f"{path}: missing keys {sorted(names - found)}, unknown keys {sorted(found - names)}"
        )
    try:
        return PairsMetadata(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
