"""Noise-image pairs of the teacher: ArrayRecord shards beside a metadata.json.

A folder is as data/shards.py says, with the fields of PairsMetadata or TextPairsMetadata. One
record is one pair: z_ref and y_ref as little-endian float32 in row-major order, then the label, or
the tokens of the text, as little-endian int32. That is 8 * H * W * C + 4 bytes, or + 4 * L for L
tokens: of Stable Diffusion 131,072 + 308 bytes for latents of 64x64x4, which is 66 GB for 500,000
pairs and 1.6 TB for 12 million.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dmd_jax.data.pairs_metadata import PairsMetadata, TextPairsMetadata, read_with_digest
from dmd_jax.data.shards import ShardReader, write_shards
from dmd_jax.errors import UserError
from dmd_jax.storage.files import path_of


def write_pairs(
    folder: str | os.PathLike,
    metadata: PairsMetadata | TextPairsMetadata,
    make_shard: Callable[[int, int], Mapping[str, np.ndarray]],
    *,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the shards of this process that are not finished yet, as `write_shards` does.

    Args:
      folder, metadata, process_index, process_count, progress: of `write_shards`.
      make_shard: (start, stop) -> "z_ref" and "y_ref" float32 [stop - start, *sample_shape] and
        "label" integers [stop - start], or "tokens" integers [stop - start, token_length] for
        TextPairsMetadata, for the pairs with these numbers. To be a function of the two alone, or
        a resumed run differs from one that was never stopped.

    Raises UserError as `write_shards`, and if make_shard returns non-finite values, labels
    outside 0..num_classes-1 or tokens outside 0..vocab_size-1.
    """

    def records(start: int, stop: int) -> Iterator[bytes]:
        packed = _pack(make_shard(start, stop), metadata, start, stop)
        return (record.tobytes() for record in packed)

    write_shards(
        folder,
        metadata,
        records,
        process_index=process_index,
        process_count=process_count,
        progress=progress,
    )


class PairSource:
    """The pairs of a finished folder as a random-access source for the loader.

    source[i] -> {"z_ref": float32 [H, W, C], "y_ref": float32 [H, W, C], "label": int32}, or with
    "tokens": int32 [token_length] in place of the label; the arrays are read-only. Shards are
    opened when they are first read. May be pickled, and read from several threads.

    Args:
      folder: as write_pairs left it.
      sample_shape, num_classes: what the reader's configuration expects.
      token_length: tokens of a prompt, if the reader expects pairs with a text, else None.

    Raises UserError if metadata.json is missing, damaged or differs from what is expected; if
    shards are missing or truncated; and, when a pair is read, if its record is damaged or its
    label or tokens are out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        sample_shape: tuple[int, ...],
        num_classes: int,
        token_length: int | None = None,
    ):
        self._folder = path_of(folder)
        self.metadata, digest = read_with_digest(folder)
        self.sample_shape = self.metadata.sample_shape
        self.num_classes = self.metadata.num_classes
        self._check_expected(tuple(sample_shape), num_classes, token_length)
        self._records = ShardReader(folder, self.metadata, digest)
        self._dtype, self._condition = self.metadata.record_dtype, self.metadata.condition

    def _check_expected(
        self, sample_shape: tuple[int, ...], num_classes: int, token_length: int | None
    ) -> None:
        with_text = isinstance(self.metadata, TextPairsMetadata)
        if with_text != (token_length is not None):
            found, expected = ("text", "labels") if with_text else ("labels", "text")
            raise UserError(
                f"{self._folder}: pairs have {found}, expected {expected} as the configuration says"
            )
        for name, found, expected in (
            ("resolution", self.sample_shape[:-1], sample_shape[:-1]),
            ("channels", self.sample_shape[-1], sample_shape[-1]),
            ("num_classes", self.num_classes, num_classes),
            ("token_length", self.metadata.token_length if with_text else None, token_length),
        ):
            if found != expected:
                raise UserError(
                    f"{self._folder}: pairs have {name} {found}, expected {expected} "
                    "as the configuration says"
                )

    @property
    def at_once(self) -> int:
        """How many are worth asking for at the same time."""
        return self._records.at_once

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        if len(record) != self._dtype.itemsize:
            detail = f"{len(record)} bytes, expected {self._dtype.itemsize}"
            raise self._records.damaged(index, detail)
        pair = np.frombuffer(record, self._dtype)[0]
        name, _, limit = self._condition
        least, largest = pair[name].min(), pair[name].max()
        if least < 0 or largest >= limit:
            wrong = least if least < 0 else largest
            raise self._records.damaged(index, f"{name} {wrong}, expected 0..{limit - 1}")
        return {name: pair[name] for name in self._dtype.names}


def _pack(
    arrays: Mapping[str, np.ndarray], metadata: PairsMetadata, start: int, stop: int
) -> np.ndarray:
    records = np.empty(stop - start, metadata.record_dtype)
    where = f"pairs {start} to {stop - 1}"
    for name in ("z_ref", "y_ref"):
        value, expected = np.asarray(arrays[name]), records[name].shape
        if value.dtype != np.float32 or value.shape != expected:
            raise UserError(
                f"{where}: {name} is {value.dtype} {value.shape}, expected float32 {expected}"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{where}: {name} holds NaN or infinity, expected finite values")
        records[name] = value
    name, shape, limit = metadata.condition
    numbers, expected = np.asarray(arrays[name]), (len(records), *shape)
    if numbers.dtype.kind not in "iu" or numbers.shape != expected:
        raise UserError(
            f"{where}: {name} is {numbers.dtype} {numbers.shape}, expected integers {expected}"
        )
    if numbers.min() < 0 or numbers.max() >= limit:
        raise UserError(
            f"{where}: {name} from {numbers.min()} to {numbers.max()}, expected 0..{limit - 1}"
        )
    records[name] = numbers
    return records
