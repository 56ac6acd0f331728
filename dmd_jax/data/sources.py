"""Kinds of image sources: arrays in memory, image files, TensorFlow data sets, and padding.

What a source gives is said in dmd_jax.data.images, which opens them.
"""

from __future__ import annotations

import os
import re
from typing import Protocol

import numpy as np

from dmd_jax.data.class_labels import read_labels
from dmd_jax.data.image_files import ImageFolder, ImageZip, decode_image
from dmd_jax.errors import UserError, first_line

# By label, None for a number without a name; None as a whole where the data have no names.
ClassNames = tuple[str | None, ...] | None

MAX_CLASSES = 1_000_000
CHECKED_AT_OPENING = 128


class ImageSource(Protocol):
    """What `open_images` returns; see the module's first lines."""

    sample_shape: tuple[int, int, int]
    num_classes: int
    class_names: ClassNames

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def bytes_to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 in [-1, 1]: b / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


class ArraySource:
    """Images held in memory: [N, H, W, C], uint8, or float32 in [-1, 1] already."""

    class_names = None

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
        self.num_classes, self.class_names = images.num_classes, images.class_names
        height, width, channels = images.sample_shape
        self.sample_shape = (height + 2 * padding, width + 2 * padding, channels)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self._images[index]
        edges = ((self._padding, self._padding),) * 2 + ((0, 0),)
        return example | {"x0": np.pad(example["x0"], edges, constant_values=-1)}


class FileSource:
    """Image files read one by one when they are asked for."""

    def __init__(self, files: ImageFolder | ImageZip):
        if not files.names:
            raise UserError(f"{files.path}: holds no image file, expected at least one")
        self._files = files
        labels = read_labels(files)
        self.class_names = None if labels is None else labels.names
        self._labels, self.num_classes = _check_labels(
            None if labels is None else labels.values, len(files.names), str(files.path)
        )
        self.sample_shape = self._pixels(0).shape
        for index in range(0, len(self), -(-len(self) // CHECKED_AT_OPENING)):
            self[index]

    def _pixels(self, index: int) -> np.ndarray:
        name = self._files.names[index]
        return decode_image(self._files.read(name), f"{self._files.path}: {name}")

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
        self.num_classes, self.class_names = 0, None
        if "label" in features:
            self.num_classes = getattr(features["label"], "num_classes", None)
            if not self.num_classes:
                raise UserError(f'{source}: the feature "label" is no ClassLabel with its classes')
            self.class_names = tuple(features["label"].names)
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
