"""Images and their labels as random-access sources for the loader.

A source gives `len(source)`, `source[i] -> {"x0": float32 [H, W, C] in [-1, 1], "label": int32}`,
`sample_shape` (H, W, C) and `num_classes`; 0 classes means that there are no labels, and "label"
is then 0. Bytes b become b / 127.5 - 1.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np

from dmd_jax.data import idx, png
from dmd_jax.errors import UserError, first_line

FORMS = (
    '"digits", a folder or .zip of PNG files, an .npz, an idx file or a folder of them, '
    'or tfds:NAME[/CONFIG]:SPLIT, and "pad2:" before any of these'
)
MAX_CLASSES = 1_000_000
CHECKED_AT_OPENING = 128


class ImageSource(Protocol):
    """What `open_images` returns; see the module's first lines."""

    sample_shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def open_images(source: str, *, resolution: int | None = None) -> ImageSource:
    """Opens a set of square images of one shape.

    Args:
      source: one of
        "digits": scikit-learn's 1,797 digits, 8x8x1, ten classes, x / 8 - 1 exactly;
        a folder or .zip of PNG files, searched through and sorted by name, labels as
        `png.read_labels` says; read when asked for;
        an .npz: the array "images", or the only one with four dimensions, NHWC, uint8 or float
        in [-1, 1], and optionally integer "labels" [N];
        an idx image file, plain or .gz, or a folder that holds MNIST's file names (its train
        split, or with "#test" after the folder its test split); labels from the label file
        beside it, if there is one;
        "tfds:NAME[/CONFIG][:VERSION]:SPLIT": a TensorFlow data set that was prepared as
        ArrayRecord under TFDS_DATA_DIR; nothing is downloaded and TensorFlow is not needed;
        "padN:" and one of these: its images with N black pixels more at each side, so that
        pad2 makes MNIST's 28x28 the 32x32 that networks halve.
      resolution: the expected H = W in pixels; None takes any.

    Raises UserError, naming the file or key, for what cannot be read, is empty, or has not one
    square shape. At most 128 PNG files, evenly spread, are read for that at once; the others
    are checked as they are read.
    """
    if padded := re.match(r"pad(\d+):", source):
        images = PaddedSource(open_images(source[padded.end() :]), int(padded[1]))
    elif source == "digits":
        images = _open_digits()
    elif source.startswith("tfds:"):
        images = TfdsSource(source)
    else:
        images = _open_path(source)
    height, width, channels = images.sample_shape
    if height != width:
        raise UserError(f"{source}: images of {height}x{width}x{channels}, expected square ones")
    if resolution is not None and height != resolution:
        raise UserError(f"{source}: images of {height}x{width}, expected resolution {resolution}")
    return images


def bytes_to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 in [-1, 1]: b / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


class ArraySource:
    """Images held in memory: [N, H, W, C], uint8, or float32 in [-1, 1] already."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, where: str):
        if images.ndim != 4 or images.size == 0:
            raise UserError(
                f"{where}: images of shape {images.shape}, expected [N, H, W, C], none of them 0"
            )
        self._images = images
        self._labels, self.num_classes = _check_labels(labels, len(images), where)
        self.sample_shape = images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        x0 = self._images[index]
        x0 = bytes_to_float(x0) if x0.dtype == np.uint8 else x0
        return {"x0": x0, "label": self._labels[index]}


class PaddedSource:
    """Another source's images with `padding` black pixels at each side."""

    def __init__(self, images: ImageSource, padding: int):
        self._images, self._padding = images, padding
        self.num_classes = images.num_classes
        height, width, channels = images.sample_shape
        self.sample_shape = (height + 2 * padding, width + 2 * padding, channels)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._images[index]
        edges = ((self._padding, self._padding),) * 2 + ((0, 0),)
        return example | {"x0": np.pad(example["x0"], edges, constant_values=-1)}


class PngSource:
    """PNG files read one by one when they are asked for."""

    def __init__(self, files: png.PngFolder | png.PngZip):
        if not files.names:
            raise UserError(f"{files.path}: holds no PNG file, expected at least one")
        self._files = files
        self._labels, self.num_classes = _check_labels(
            png.read_labels(files), len(files.names), str(files.path)
        )
        self.sample_shape = self._pixels(0).shape
        for index in range(0, len(self), -(-len(self) // CHECKED_AT_OPENING)):
            self[index]

    def _pixels(self, index: int) -> np.ndarray:
        name = self._files.names[index]
        return png.decode_png(self._files.read(name), f"{self._files.path}: {name}")

    def __len__(self) -> int:
        return len(self._files.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pixels = self._pixels(index)
        if pixels.shape != self.sample_shape:
            raise UserError(
                f"{self._files.path}: {self._files.names[index]} has shape {pixels.shape}, "
                f"expected {self.sample_shape} as {self._files.names[0]} has"
            )
        return {"x0": bytes_to_float(pixels), "label": self._labels[index]}


class TfdsSource:
    """A prepared TensorFlow data set, read through tfds.data_source when examples are asked for."""

    def __init__(self, source: str):
        match = re.fullmatch(r"tfds:([^:]+(?::\d+\.\d+\.\d+)?):(.+)", source)
        if match is None:
            raise UserError(f"{source}: expected tfds:NAME[/CONFIG][:VERSION]:SPLIT")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"{source}: needs the package tensorflow-datasets") from error
        data_dir = os.environ.get("TFDS_DATA_DIR")
        try:
            self._examples = tfds.data_source(
                match[1], split=match[2], download=False, data_dir=data_dir
            )
            features = dict(self._examples.dataset_info.features)
        except Exception as error:  # whatever the data set's own code raises
            raise UserError(
                f"{source}: cannot be read ({first_line(error)}); expected a data set prepared "
                f"with file_format=array_record under TFDS_DATA_DIR={data_dir or '(not set)'}"
            ) from error
        if len(self._examples) == 0:
            raise UserError(f"{source}: holds no example, expected at least one")
        self._source = source
        self._image_key = _image_key(features, tfds.features.Image, source)
        self.num_classes = 0
        if "label" in features:
            self.num_classes = getattr(features["label"], "num_classes", None)
            if not self.num_classes:
                raise UserError(f'{source}: the feature "label" is no ClassLabel with its classes')
        self.sample_shape = self._example(0)[self._image_key].shape
        self[0]

    def _example(self, index: int) -> dict[str, np.ndarray]:
        try:
            return self._examples[index]
        except Exception as error:  # damaged records, decoders that want TensorFlow, …
            raise UserError(
                f"{self._source}: example {index} cannot be read ({first_line(error)})"
            ) from error

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = range(len(self))[index]
        example = self._example(index)
        pixels = example[self._image_key]
        if pixels.shape != self.sample_shape or pixels.ndim != 3 or pixels.dtype != np.uint8:
            raise UserError(
                f"{self._source}: example {index} is {pixels.dtype} of shape {pixels.shape}, "
                f"expected uint8 [H, W, C] as the first, {self.sample_shape}"
            )
        label = int(example["label"]) if self.num_classes else 0
        if not 0 <= label < max(self.num_classes, 1):
            raise UserError(
                f"{self._source}: example {index} has label {label}, "
                f"expected 0..{self.num_classes - 1}"
            )
        return {"x0": bytes_to_float(pixels), "label": np.int32(label)}


def _image_key(features: dict, image_type: type, source: str) -> str:
    keys = [key for key, feature in features.items() if isinstance(feature, image_type)]
    if "image" in keys:
        return "image"
    if len(keys) != 1:
        raise UserError(f'{source}: has the image features {keys}, expected "image" or just one')
    return keys[0]


def _check_labels(labels: np.ndarray | None, count: int, where: str) -> tuple[np.ndarray, int]:
    """The labels as int32 [count] and the number of classes, one more than the largest label."""
    if labels is None:
        return np.zeros(count, np.int32), 0
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}, "
            f"expected integers of shape ({count},), one for each image"
        )
    for label in (labels.min(), labels.max()):
        if not 0 <= label < MAX_CLASSES:
            raise UserError(f"{where}: label {label} found, expected 0..{MAX_CLASSES - 1}")
    return labels.astype(np.int32), int(labels.max()) + 1


def _open_digits() -> ArraySource:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('images "digits": need the package scikit-learn') from error
    digits = load_digits()  # images: float64 [1797, 8, 8], whole numbers 0..16
    images = (digits.images / 8 - 1).astype(np.float32)[..., np.newaxis]
    return ArraySource(images, digits.target, "digits")


def _open_path(source: str) -> ImageSource:
    path, split = Path(source), None
    if not path.exists() and "#" in source:
        name, _, split = source.rpartition("#")
        path = Path(name)
        if split not in ("train", "test"):
            raise UserError(f"{source}: unknown split {split!r}, expected #train or #test")
    if not path.exists():
        raise UserError(f"{source}: no such file or folder, expected {FORMS}")
    if path.is_dir():
        found = idx.find_images(path, split or "train")
        if found is not None:
            return _open_idx(found)
        if split is None:
            return PngSource(png.PngFolder(path))
    if split is not None:
        raise UserError(f"{source}: #{split} is for a folder that holds that split's idx files")
    if path.suffix == ".npz":
        return _open_npz(path)
    if path.suffix == ".zip":
        return PngSource(png.PngZip(path))
    if idx.is_images_file(path):
        return _open_idx(path)
    raise UserError(f"{source}: unknown kind of file, expected {FORMS}")


def _open_idx(path: Path) -> ArraySource:
    images = idx.read_idx(path, ndim=3)[..., np.newaxis]
    labels_path = idx.find_labels(path)
    labels = None if labels_path is None else idx.read_idx(labels_path, ndim=1)
    return ArraySource(images, labels, str(path))


def _open_npz(path: Path) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            wanted = {"images", "labels"} if "images" in arrays.files else set(arrays.files)
            held = {name: arrays[name] for name in arrays.files if name in wanted}
    except Exception as error:  # NumPy, zipfile and zlib each raise their own on damaged bytes
        raise UserError(
            f"{path}: cannot be read as an .npz of plain arrays ({first_line(error)})"
        ) from error
    images = held.get("images")
    if images is None:
        candidates = [name for name, value in held.items() if value.ndim == 4]
        if len(candidates) != 1:
            raise UserError(
                f"{path}: holds {_described(held)}; expected an array images, "
                "or just one array with four dimensions"
            )
        images = held[candidates[0]]
    if images.dtype.kind == "f":
        # A comparison that NaN fails too.
        if not (np.abs(images) <= 1).all():
            raise UserError(f"{path}: float images with values outside [-1, 1], or NaN")
        images = images.astype(np.float32)
    elif images.dtype != np.uint8:
        raise UserError(f"{path}: images of type {images.dtype}, expected uint8 or float")
    return ArraySource(images, held.get("labels"), str(path))


def _described(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items()) or "nothing"
