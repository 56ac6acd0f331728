"""The features of real images and of samples, made part by part."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import Features
from dmd_jax.evaluation.parts import Rows
from dmd_jax.evaluation.reference import Reference
from dmd_jax.generation import ImageMaker, draw_labels, draw_latents
from dmd_jax.metrics import Progress

REFERENCE_PART = 512
SHOWN_EVERY = 2.0  # seconds


def reference_rows(folder: Path, reference: Reference, features: list[Features]) -> Rows:
    """The features of the real images, as arrays "features_0" and so on.

    Raises:
      UserError: an image cannot be read, features are not finite, a part cannot be written.
    """
    rows = Rows(folder, "reference", len(reference.indices), REFERENCE_PART)
    counter = _Counter("reference")

    def make_part(start: int, stop: int) -> dict[str, np.ndarray]:
        indices = reference.indices[start:stop]
        images = np.stack([reference.images[int(index)]["x0"] for index in indices])
        arrays = _extract(features, images, f"real images {start} to {stop - 1}")
        counter.add(len(images))
        return arrays

    rows.make(make_part, counter.start)
    return rows


def sample_rows(
    folder: Path,
    maker: ImageMaker,
    features: list[Features],
    *,
    num: int,
    part_size: int,
    seed: int,
    keep_images: bool,
) -> Rows:
    """The same of samples, and the "seconds" that each took one process, compilation left out.

    Args:
      num: samples, each a function of the seed and its index.
      keep_images: keep "images" float32 [N, H, W, C] and "labels" int32 [N] as well.

    Raises:
      UserError: images or features are not finite, a part cannot be written.
    """
    rows = Rows(folder, "samples", num, part_size)
    counter = _Counter("evaluate")
    compiled = False

    def make_part(start: int, stop: int) -> dict[str, np.ndarray]:
        nonlocal compiled
        z = draw_latents(seed, start, stop, maker.sample_shape)
        labels = draw_labels(seed, start, stop, maker.num_classes)
        if not compiled:
            maker(z[:1], labels[:1])
            compiled = True
        began = time.perf_counter()
        parts = []
        for part in maker.batches(z, labels, seed=seed, first=start):
            parts.append(part)
            counter.add(len(part))
        seconds = (time.perf_counter() - began) / len(z)
        images = np.concatenate(parts)
        where = f"samples {start} to {stop - 1}"
        if not np.isfinite(images).all():
            raise UserError(f"{where} hold NaN or infinity, expected finite images")
        arrays = _extract(features, images, where) | {"seconds": np.full(len(z), seconds)}
        return arrays | ({"images": images, "labels": labels} if keep_images else {})

    rows.make(make_part, counter.start)
    return rows


def _extract(features: list[Features], images: np.ndarray, where: str) -> dict[str, np.ndarray]:
    arrays = {f"features_{number}": one.extract(images) for number, one in enumerate(features)}
    for one, array in zip(features, arrays.values()):
        if not np.isfinite(array).all():
            raise UserError(f'features "{one.name}" of {where} hold NaN or infinity')
    return arrays


class _Counter:
    """A progress line of this process's rows, which the first process shows."""

    def __init__(self, name: str):
        self._name = name

    def start(self, done: int, total: int) -> None:
        self._done, self._total, self._shown = done, total, time.monotonic()
        first = jax.process_index() == 0
        if first and 0 < done < total:
            print(f"{self._name}: going on after {done:,} of {total:,}", file=sys.stderr)
        self._progress = Progress(self._name, total, start=done, enabled=first)

    def add(self, count: int) -> None:
        self._done += count
        if self._done == self._total or time.monotonic() - self._shown > SHOWN_EVERY:
            self._progress.update(self._done)
            self._shown = time.monotonic()
