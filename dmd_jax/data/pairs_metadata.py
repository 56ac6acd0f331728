"""What a folder of noise-image pairs says of itself: its metadata.json.

The same for text has more keys, by which a reader knows it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dmd_jax.data import shards_metadata


class Condition(NamedTuple):
    """What a record holds beside its latents and image: whole numbers in 0..limit-1."""

    name: str
    shape: tuple[int, ...]  # of one record's
    limit: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsMetadata(shards_metadata.ShardedMetadata):
    """What a folder of pairs holds and how it was made. Raises UserError for impossible values."""

    KIND: ClassVar[str] = "pairs"
    MAY_LACK: ClassVar[tuple[str, ...]] = ("compute_dtype", "matmul_precision")

    teacher: str  # where the teacher's weights came from, in words or as a path
    teacher_sha256: str
    sampler: str
    num_steps: int
    guidance: float  # classifier-free guidance scale, 1 for none
    seed: int
    sample_shape: tuple[int, ...]  # (H, W, C)
    num_classes: int  # 0: no labels, and every label is 0
    dtype: str = "float32"  # of the records' images
    # In what the teacher computed y_ref. None: not recorded, as of folders without these keys,
    # which are read but not gone on with.
    compute_dtype: str | None = None
    matmul_precision: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self._require("dtype", self.dtype == "float32", "'float32'")
        for name in self.MAY_LACK:
            self._require(name, isinstance(getattr(self, name), str | None), "text, or null")
        for name in ("teacher", "teacher_sha256", "sampler"):
            self._require(name, isinstance(getattr(self, name), str), "text")
        self._require_whole(num_steps=1, seed=0, num_classes=0)
        ok = type(self.guidance) in (int, float) and math.isfinite(self.guidance)
        self._require("guidance", ok, "a finite number")
        ok = isinstance(self.sample_shape, (tuple, list)) and len(self.sample_shape) > 0
        ok = ok and all(type(size) is int and size > 0 for size in self.sample_shape)
        self._require("sample_shape", ok, "positive whole numbers [H, W, C]")
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))

    @property
    def condition(self) -> Condition:
        return Condition("label", (), max(self.num_classes, 1))

    @property
    def record_dtype(self) -> np.dtype:
        """The layout of one record; packed, so that its itemsize is the record's length."""
        return np.dtype(
            [
                ("z_ref", "<f4", self.sample_shape),
                ("y_ref", "<f4", self.sample_shape),
                (self.condition.name, "<i4", self.condition.shape),
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPairsMetadata(PairsMetadata):
    """The same of pairs with a text, whose images are an autoencoder's latents."""

    token_length: int  # tokens of each prompt
    vocab_size: int  # of the text encoder; tokens are below it
    text_encoder_sha256: str  # of the parameters that read the tokens
    prompts: int  # that the pairs were made of, each once before any is used twice
    prompts_sha256: str  # as in the metadata.json of the prompts
    sampling: dict[str, Any]  # the scheduler.json that the sampler went by

    def __post_init__(self):
        super().__post_init__()
        self._require("num_classes", self.num_classes == 0, "0 for pairs with a text")
        self._require_whole(token_length=1, vocab_size=1, prompts=1)
        for name in ("text_encoder_sha256", "prompts_sha256"):
            self._require(name, isinstance(getattr(self, name), str), "text")
        self._require("sampling", isinstance(self.sampling, dict), "a JSON object")

    @property
    def condition(self) -> Condition:
        return Condition("tokens", (self.token_length,), self.vocab_size)


def read_metadata(folder: str | os.PathLike) -> PairsMetadata | TextPairsMetadata:
    """Reads a folder's metadata.json. Raises UserError if it is missing, damaged or incomplete."""
    return read_with_digest(folder)[0]


def read_with_digest(folder: str | os.PathLike) -> tuple[PairsMetadata | TextPairsMetadata, str]:
    """As `read_metadata`, and the digest by which shards know their folder."""
    return shards_metadata.read_with_digest(folder, PairsMetadata, TextPairsMetadata)
