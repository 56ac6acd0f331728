"""Prompts as ArrayRecord shards beside a metadata.json, made once from files of many kinds.

A folder is as data/shards.py says, with the fields of PromptsMetadata. One record is one prompt in
UTF-8, exactly as its source has it. Text is kept, not tokens: it fits any tokenizer, can be read
by people, and takes a third of the bytes of 77 tokens; tokenising it again costs a fifth of a
millisecond, which is nothing beside a sampled pair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from dmd_jax.data.prompt_rows import BrokenRow, PromptRows
from dmd_jax.data.shards import ShardReader, write_shards
from dmd_jax.data.shards_metadata import ShardedMetadata, read_with_digest
from dmd_jax.errors import UserError
from dmd_jax.progress import Pace
from dmd_jax.teachers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SHARD_SIZE = 100_000
_NAMED_ROWS = 5  # of the broken ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsMetadata(ShardedMetadata):
    """What a folder of prompts holds. Raises UserError for impossible values."""

    KIND: ClassVar[str] = "prompts"

    source: str  # the names of the files, the first and the last of many
    files: int
    key: str | None  # of the JSON objects or the column, where there are any
    skipped: int  # broken rows of the source that are left out
    prompts_sha256: str  # of all prompts in order, each after its length in 8 bytes, little-endian

    def __post_init__(self):
        super().__post_init__()
        for name in ("source", "prompts_sha256"):
            self._require(name, isinstance(getattr(self, name), str), "text")
        self._require("key", self.key is None or isinstance(self.key, str), "text or null")
        self._require_whole(files=1, skipped=0)


def write_prompts(
    folder: str | os.PathLike,
    source: str | os.PathLike,
    *,
    key: str | None = None,
    shard_size: int = SHARD_SIZE,
    skip_broken: bool = False,
    checked: Callable[[int], None] | None = None,
    written: Callable[[int, int], None] | None = None,
) -> PromptsMetadata:
    """Writes the prompts of a source as shards, those that are not finished yet.

    The source is read twice: once to check all rows before anything is written, and once to write.
    Its hash is that of the prompts, not of the files, whose bytes may be nearly all images.

    Args:
      folder: made if need be. source, key: as PromptRows takes them.
      skip_broken: leaves broken rows out and warns, in place of refusing the source.
      checked: called now and then with the rows read so far, and at the end.
      written: as the progress of write_shards.

    Raises UserError as PromptRows and write_shards; for a source with broken rows, which are
    counted and of which the first are named, and for one without any prompt; and for one that
    changes while it is read.
    """
    if shard_size < 1:
        raise UserError(f"shard size {shard_size}, expected at least 1")
    rows = PromptRows(source, key=key)
    survey = _Survey(rows, shard_size, checked)
    names = [path.name for path in rows.files]
    total = survey.count + survey.skipped
    if not total:
        raise UserError(f"{source}: holds no prompts, expected at least one row")
    if not survey.count:
        raise UserError(f"{source}: all {total:,} rows are broken: {survey.named()}")
    if survey.skipped and not skip_broken:
        raise UserError(
            f"{source}: {survey.skipped:,} of {total:,} rows are broken: {survey.named()}; "
            "--skip-broken leaves them out"
        )
    metadata = PromptsMetadata(
        source=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
        files=len(names),
        key=rows.key,
        count=survey.count,
        skipped=survey.skipped,
        shard_size=shard_size,
        prompts_sha256=survey.digests[-1],
    )
    if survey.skipped:
        log.warning(
            "%s: %s of %s rows are broken and left out: %s",
            *(source, f"{survey.skipped:,}", f"{total:,}", survey.named()),
        )
    prompts, digest = _prompts(rows), hashlib.sha256()
    reached = 0

    def records(start: int, stop: int) -> Iterator[bytes]:
        nonlocal reached
        for prompt in itertools.islice(prompts, stop - reached):
            reached += 1
            _add(digest, prompt)
            if reached > start:
                yield prompt
        if reached != stop or digest.hexdigest() != survey.digests[(stop - 1) // shard_size]:
            raise UserError(f"{source}: changed while it was read, expected to find it the same")

    write_shards(folder, metadata, records, progress=written)
    return metadata


class PromptSource:
    """The prompts of a finished folder: source[i] -> str. May be pickled and read by threads.

    Raises UserError if metadata.json is missing or damaged; if shards are missing or truncated;
    and, when a prompt is read, if its record is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.metadata, digest = read_with_digest(folder, PromptsMetadata)
        self._records = ShardReader(folder, self.metadata, digest)

    @property
    def at_once(self) -> int:
        """How many are worth asking for at the same time."""
        return self._records.at_once

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        record = self._records[index]
        try:
            return record.decode()
        except UnicodeDecodeError as error:
            raise self._records.damaged(operator.index(index), "no UTF-8") from error


class TokenSource:
    """The tokens of prompts for the loader: source[i] -> {"tokens": int32 [max_length]}.

    Tokens are made when they are asked for. May be pickled and read by threads.

    Raises UserError, when tokens are read, as PromptSource and Tokenizer do.
    """

    def __init__(self, prompts: PromptSource, tokenizer: Tokenizer):
        self._prompts, self._tokenizer = prompts, tokenizer

    @property
    def at_once(self) -> int:
        """How many are worth asking for at the same time."""
        return self._prompts.at_once

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._tokenizer.encode([self._prompts[index]])[0]}


class _Survey:
    """What the rows hold: how many prompts and broken rows, and the hash up to each shard's end."""

    def __init__(self, rows: PromptRows, shard_size: int, checked: Callable[[int], None] | None):
        self.count = self.skipped = 0
        self.digests: list[str] = []
        self._broken: list[BrokenRow] = []
        digest, pace = hashlib.sha256(), Pace()
        for row in rows:
            if isinstance(row, BrokenRow):
                self.skipped += 1
                if self.skipped <= _NAMED_ROWS:
                    self._broken.append(row)
            else:
                self.count += 1
                _add(digest, row)
                if self.count % shard_size == 0:
                    self.digests.append(digest.hexdigest())
            if checked and pace.due():
                checked(self.count + self.skipped)
        if self.count % shard_size:
            self.digests.append(digest.hexdigest())
        if checked:
            checked(self.count + self.skipped)

    def named(self) -> str:
        more = "; …" if self.skipped > len(self._broken) else ""
        return "; ".join(f"{where}: {problem}" for where, problem in self._broken) + more


def _prompts(rows: PromptRows) -> Iterator[bytes]:
    return (row for row in rows if not isinstance(row, BrokenRow))


def _add(digest, prompt: bytes) -> None:
    digest.update(len(prompt).to_bytes(8, "little") + prompt)
