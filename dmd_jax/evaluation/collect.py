"""The features of real images and of samples, made part by part."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np

from dmd_jax.errors import UserError
from dmd_jax.evaluation.features import Features, ToBytes
from dmd_jax.evaluation.parts import Rows
from dmd_jax.evaluation.reference import Reference
from dmd_jax.evaluation.samples import Samples
from dmd_jax.progress import Pace, Progress
from dmd_jax.reporting.pictures import to_uint8

REFERENCE_PART = 512


def reference_rows(folder: Path, reference: Reference, features: list[Features]) -> Rows:
    """The features of the real images, as arrays "features_0" and so on.

    Raises:
      UserError: an image cannot be read, features are not finite, a part cannot be written.
    """
    rows = Rows(folder, "reference", len(reference.indices), REFERENCE_PART)
    counter = Counter("reference")

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
    samples: Samples,
    features: list[Features],
    *,
    num: int,
    part_size: int,
    keep_images: bool,
) -> Rows:
    """The same of samples, their scores, and the "seconds" that each took one process to make.

    Compilation is left out of these.

    Args:
      num: how many.
      keep_images: keep "images" float32 [N, H, W, C], as judged, and what samples.kept names.

    Raises:
      UserError: images or features are not finite, a part cannot be written.
    """
    rows = Rows(folder, "samples", num, part_size)
    counter = Counter("evaluate")
    compiled = False

    def make_part(start: int, stop: int) -> dict[str, np.ndarray]:
        nonlocal compiled
        inputs = samples.inputs(start, stop)
        if not compiled:
            samples.warm_up()
            compiled = True
        began = time.perf_counter()
        parts = []
        for part in samples.images(inputs, start):
            parts.append(part)
            counter.add(len(part))
        count = stop - start
        seconds = (time.perf_counter() - began) / count
        images = np.concatenate(parts)
        where = f"samples {start} to {stop - 1}"
        if not np.isfinite(images).all():
            raise UserError(f"{where} hold NaN or infinity, expected finite images")
        images = samples.judged(images)
        arrays = _extract(features, images, where, samples.to_bytes)
        arrays |= samples.scores(images, start)
        arrays["seconds"] = np.full(count, seconds)
        if keep_images:
            arrays |= {"images": images}
            arrays |= {kept: inputs[name] for name, kept in samples.kept.items()}
        return arrays

    rows.make(make_part, counter.start)
    return rows


def _extract(
    features: list[Features], images: np.ndarray, where: str, to_bytes: ToBytes = to_uint8
) -> dict[str, np.ndarray]:
    arrays = {
        f"features_{number}": one.extract(images, to_bytes) for number, one in enumerate(features)
    }
    for one, array in zip(features, arrays.values()):
        if not np.isfinite(array).all():
            raise UserError(f'features "{one.name}" of {where} hold NaN or infinity')
    return arrays


class Counter:
    """A progress line of this process's rows, which the first process shows."""

    def __init__(self, name: str):
        self._name = name

    def start(self, done: int, total: int) -> None:
        self._done, self._total, self._pace = done, total, Pace()
        first = jax.process_index() == 0
        if first and 0 < done < total:
            print(f"{self._name}: going on after {done:,} of {total:,}", file=sys.stderr)
        self._progress = Progress(self._name, total, start=done, enabled=first)

    def add(self, count: int) -> None:
        self._done += count
        if self._done == self._total or self._pace.due():
            self._progress.update(self._done)
