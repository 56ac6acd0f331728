"""What samples are measured against: real images, or statistics of their features."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmd_jax.data.images import open_images
from dmd_jax.data.sources import ImageSource
from dmd_jax.errors import UserError, first_line
from dmd_jax.evaluation import edm2_statistics
from dmd_jax.evaluation.features import Features
from dmd_jax.evaluation.frechet import Statistics
from dmd_jax.storage.bucket_copies import local_copy
from dmd_jax.storage.files import in_bucket, path_of, replacing
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.untrusted import read_npz

FINGERPRINTED = 1024  # images
# Asymmetry of a covariance, against its largest value, that rounding can explain.
SYMMETRY_TOLERANCE = 1e-6


class Reference(NamedTuple):
    """Real images, or the statistics of their features: one of the two is None."""

    images: ImageSource | None
    indices: range | np.ndarray  # of the images that count
    statistics: Statistics | None
    # What it depends on, whatever the name it was opened by; JSON-able. Images are known by their
    # number and the SHA-256 of 1,024 of them, evenly spread: a change in others goes unseen.
    origin: dict[str, Any]

    @property
    def count(self) -> int | None:
        """How many images; None where that is unknown."""
        return len(self.indices) if self.images is not None else self.statistics.count


def open_reference(
    source: str, sample_shape: tuple[int, ...], features: list[Features], num: int | None = None
) -> Reference:
    """Opens a reference.

    Args:
      source: what `open_images` takes, or an .npz of the arrays "mu" [D] and "sigma" [D, D], as
        EDM publishes them for Inception's features and `save_reference` writes them, with the
        features' name; where that is missing, nothing of the features may be assumed (`unsaid`).
        Or EDM2's .pkl: see edm2_statistics.
      sample_shape: (H, W, C) of the samples. features: what both sides are measured in.
      num: so many of the images, evenly spread over the set, which may be sorted by class.

    Raises:
      UserError: it cannot be read, or its shape or dimension is another than the samples'.
    """
    path = statistics_file(source)
    if path is not None:
        if num is not None:
            raise UserError(f"--num-reference {num}: {source} holds no images to choose from")
        statistics = load_statistics(path, sample_shape, features)
        digest = _sha256([statistics.mean, statistics.covariance])
        return Reference(None, range(0), statistics, {"sha256": digest})
    images = open_images(source, resolution=sample_shape[0])
    if images.sample_shape != sample_shape:
        raise UserError(
            f"--reference {source} has images of shape {images.sample_shape}; expected "
            f"{sample_shape} as the samples have"
        )
    if num is not None and not 2 <= num <= len(images):
        raise UserError(f"--num-reference {num}; expected 2 to {len(images)}, all of {source}")
    indices = evenly(len(images), num or len(images))
    some = [images[int(index)]["x0"] for index in evenly(len(images), FINGERPRINTED)]
    origin = {"sha256": _sha256(some), "images": len(images), "chosen": len(indices)}
    return Reference(images, indices, None, origin)


def evenly(count: int, num: int) -> np.ndarray:
    """`num` indices, or all if there are fewer, evenly spread over 0..count-1."""
    num = min(num, count)
    return np.arange(num) * count // num


def statistics_file(source: str) -> Path | None:
    """The file on this host, if it is one of statistics, an .npz or EDM2's .pkl, and no images."""
    if not source.endswith((".npz", ".pkl")):
        return None
    path = path_of(source)
    if in_bucket(path):
        path = local_copy(path)
    if source.endswith(".pkl"):
        return path
    try:
        check_real_file(path, "an .npz")
        with zipfile.ZipFile(path) as file:
            return path if {"mu.npy", "sigma.npy"} <= set(file.namelist()) else None
    except Exception:  # zipfile raises many kinds on damaged bytes, which `open_images` reports
        return None


def load_statistics(
    path: Path, sample_shape: tuple[int, ...], features: list[Features]
) -> Statistics:
    """Reads "mu" and "sigma", and what `save_reference` adds to them.

    Raises:
      UserError: the file cannot be read, or holds no mean and covariance of the features, or does
        not say of which features while something of these is assumed.
    """
    if path.suffix == ".pkl":
        held = edm2_statistics.read_statistics(path, features)
    else:
        held = _read_npz(path, features)
    mean, covariance = held["mu"], held["sigma"]
    for name in ("mu", "sigma"):
        if held[name].dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} is {held[name].dtype}, expected floating point")
    for one in features:
        dimensions = one.dimensions(sample_shape)
        if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
            raise UserError(
                f"{path}: reference statistics of another dimension: mu {mean.shape} and sigma "
                f"{covariance.shape}, expected ({dimensions},) and ({dimensions}, {dimensions}) "
                f"as {one.name} features have"
            )
    try:
        count = int(held["count"]) if "count" in held else None
        statistics = Statistics(count, mean, covariance)
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    largest = np.abs(statistics.covariance).max()
    asymmetry = np.abs(statistics.covariance - statistics.covariance.T).max()
    if asymmetry > SYMMETRY_TOLERANCE * largest or np.diagonal(statistics.covariance).min() < 0:
        raise UserError(f"{path}: sigma is not symmetric with variances on its diagonal")
    return statistics


def _read_npz(path: Path, features: list[Features]) -> dict[str, Any]:
    held = read_npz(path, "an .npz of statistics", ("mu", "sigma", "count", "features"))
    for one in features:
        if "features" not in held and one.unsaid is not None:
            raise UserError(
                f"{path} does not say which features its statistics are of; expected {one.unsaid}"
            )
        if "features" in held and str(held["features"]) != _described(one):
            raise UserError(
                f"{path}: statistics of {held['features']!s}, expected of {_described(one)}"
            )
    return held


def save_reference(path: Path, statistics: Statistics, features: Features) -> None:
    """Writes statistics for `open_reference`: mu, sigma, their count and of which features.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {
        "mu": statistics.mean,
        "sigma": statistics.covariance,
        "features": _described(features),
    }
    if statistics.count is not None:
        arrays["count"] = statistics.count
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error


def _described(features: Features) -> str:
    return " ".join([features.name, *(f"{key}={value}" for key, value in features.origin.items())])


def _sha256(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
