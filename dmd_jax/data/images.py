"""Images and their labels as random-access sources for the loader.

A source gives `len(source)`, `source[i] -> {"x0": float32 [H, W, C] in [-1, 1], "label": int32}`,
`sample_shape` (H, W, C) and `num_classes`; 0 classes means that there are no labels, and "label"
is then 0. `class_names` has the names of the classes by label where the data have them, else None.
Bytes b become b / 127.5 - 1.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from dmd_jax.data import idx
from dmd_jax.data.image_files import ImageFolder, ImageZip
from dmd_jax.data.sources import ArraySource, FileSource, ImageSource, PaddedSource, TfdsSource
from dmd_jax.errors import UserError
from dmd_jax.storage.bucket_copies import local_copy
from dmd_jax.storage.files import in_bucket, path_of
from dmd_jax.storage.real_files import check_real_file, is_there
from dmd_jax.storage.untrusted import read_npz

FORMS = (
    '"digits", a folder or .zip of images (PNG, JPEG, WebP, BMP, TIFF), an .npz, an idx file or a '
    "folder of them, or tfds:NAME[/CONFIG]:SPLIT, and padN: before any of these"
)


def open_images(source: str, *, resolution: int | None = None) -> ImageSource:
    """Opens a set of square images of one shape.

    Args:
      source: one of
        "digits": scikit-learn's 1,797 digits, 8x8x1, ten classes, x / 8 - 1 exactly;
        a folder or .zip of PNG, JPEG, WebP, BMP and TIFF files, searched through and sorted by
        name, labels as `read_labels` says; read when asked for;
        an .npz: the array "images", or the only one with four dimensions, NHWC, uint8 or float
        in [-1, 1], and optionally integer "labels" [N], under any name if there is just one array
        of such labels; float images of which no value is below 0 are refused, since they are of
        [0, 1];
        an idx image file, plain or .gz, or a folder that holds MNIST's file names (its train
        split, or with "#test" after the folder its test split); labels from the label file
        beside it, if there is one;
        "tfds:NAME[/CONFIG][:VERSION]:SPLIT": a TensorFlow data set that was prepared as
        ArrayRecord under TFDS_DATA_DIR; nothing is downloaded and TensorFlow is not needed;
        "padN:" and one of these: its images with N black pixels more at each side, N to 999, so
        that pad2 makes MNIST's 28x28 the 32x32 that networks halve.
        A .zip or .npz may be in a bucket, gs://…, and is copied to this host.
      resolution: the expected H = W in pixels; None takes any.

    Raises UserError, naming the file or key, for what cannot be read, is empty, or has not one
    square shape. At most 128 files, evenly spread, are read for that at once; the others
    are checked as they are read.
    """
    padded = re.match(r"pad(\d{1,3}):", source)
    images = _open(source[padded.end() :] if padded else source)
    if padded:
        images = PaddedSource(images, int(padded[1]))
    height, width, channels = images.sample_shape
    if height != width:
        raise UserError(f"{source}: images of {height}x{width}x{channels}, expected square ones")
    if resolution is not None and height != resolution:
        raise UserError(f"{source}: images of {height}x{width}, expected resolution {resolution}")
    return images


def _open(source: str) -> ImageSource:
    if source == "digits":
        return _open_digits()
    return TfdsSource(source) if source.startswith("tfds:") else _open_path(source)


def _open_digits() -> ArraySource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('images "digits": need the package scikit-learn') from error
    digits = load_digits()  # images: float64 [1797, 8, 8], whole numbers 0..16
    images = (digits.images / 8 - 1).astype(np.float32)[..., np.newaxis]
    return ArraySource(images, digits.target, "digits")


def _open_path(source: str) -> ImageSource:
    path, split = path_of(source), None
    if in_bucket(path):
        if path.suffix not in (".zip", ".npz"):
            raise UserError(f"{source}: expected a .zip or .npz in a bucket, or a local path")
        path = local_copy(path)
    if not path.exists() and "#" in source:
        name, _, split = source.rpartition("#")
        path = path_of(name)
        if split not in ("train", "test"):
            raise UserError(f"{source}: unknown split {split!r}, expected #train or #test")
    if not is_there(path):
        raise UserError(f"{source}: no such file or folder, expected {FORMS}")
    if not path.is_dir():
        check_real_file(path, FORMS)
    else:
        found = idx.find_images(path, split or "train")
        if found is not None:
            return _open_idx(found)
        if split is None:
            return FileSource(ImageFolder(path))
    if split is not None:
        raise UserError(f"{source}: #{split} is for a folder that holds that split's idx files")
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix == ".zip":
        return FileSource(ImageZip(path))
    if idx.is_images_file(path):
        return _open_idx(path)
    raise UserError(f"{source}: unknown kind of file, expected {FORMS}")


def _open_idx(path: Path) -> ArraySource:
    images = idx.read_idx(path, ndim=3)[..., np.newaxis]
    labels_path = idx.find_labels(path)
    labels = None if labels_path is None else idx.read_idx(labels_path, ndim=1)
    return ArraySource(images, labels, str(path))


def _open_npz(path: Path) -> ArraySource:
    held = read_npz(path, "an .npz of images and, if there are any, labels")
    name = "images"
    if name not in held:
        candidates = [name for name, value in held.items() if value.ndim == 4]
        if len(candidates) != 1:
            raise UserError(
                f"{path}: holds {_described(held)}; expected an array images, "
                "or just one array with four dimensions"
            )
        (name,) = candidates
    images = held.pop(name)
    if images.dtype.kind == "f":
        # A comparison that NaN fails too.
        if not (np.abs(images) <= 1).all():
            raise UserError(f"{path}: float images with values outside [-1, 1], or NaN")
        if images.size and images.min() >= 0:
            raise UserError(
                f"{path}: float images of which no value is below 0, so of [0, 1]; expected "
                "[-1, 1] (2 x - 1) or uint8"
            )
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise UserError(f"{path}: images of type {images.dtype}, expected uint8 or float")
    return ArraySource(images, _labels_among(held, len(images), path), str(path))


def _labels_among(held: dict[str, np.ndarray], count: int, path: Path) -> np.ndarray | None:
    """The array "labels", or the only one that can be labels; says what is passed over."""
    name = "labels"
    if name not in held:
        candidates = [
            name
            for name, value in held.items()
            if value.shape == (count,) and value.dtype.kind in "iu"
        ]
        if len(candidates) > 1:
            raise UserError(
                f"{path}: {' and '.join(candidates)} may each be the labels; expected one of them, "
                'or an array "labels"'
            )
        name = candidates[0] if candidates else None
    labels = held.pop(name, None)
    if held:
        print(f"{path}: passed over: {_described(held)}", file=sys.stderr)
    return labels


def _described(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items()) or "nothing"
