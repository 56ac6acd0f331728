"""Features that distances are measured in: raw pixels, Inception, VGG16, or the user's own."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dmd_jax.data.sources import bytes_to_float
from dmd_jax.errors import UserError, first_line
from dmd_jax.models.judges.inception import PREPROCESSINGS, SIDE, class_logits, pool3
from dmd_jax.models.judges.lpips import vgg16_features
from dmd_jax.models.ops.resizing import pil_bicubic
from dmd_jax.parallel.sharding import batch_sharding, make_mesh, place, replicated
from dmd_jax.reporting.pictures import to_uint8
from dmd_jax.sampling.devices import pad_rows
from dmd_jax.storage.files import file_sha256
from dmd_jax.storage.judge_weights import (
    INCEPTION,
    LPIPS,
    describe_auxiliary,
    how_to_make,
    load_auxiliary,
)

BATCH_PER_DEVICE = 64
MAX_DIMENSIONS = 20_000  # a covariance in float64 then has 3.2 GB
PREPROCESSING, RESOLUTION = "pytorch_fid", 224  # where none is asked for
ToBytes = Callable[[np.ndarray], np.ndarray]  # images in [-1, 1] -> uint8 of their shape


class Features(NamedTuple):
    """What turns images into vectors.

    `extract` raises a UserError if the images do not fit, or if the user's function returns
    anything but N rows of numbers. Networks see the bytes that `to_bytes` makes of the images, by
    EDM's rule where none is given: of images that were bytes, these bytes.
    """

    name: str
    # images [N, H, W, C] in [-1, 1], to_bytes=to_uint8 -> [N, D]
    extract: Callable[..., np.ndarray]
    logits: Callable[[np.ndarray], np.ndarray] | None  # features [N, D] -> [N, classes]
    # (H, W, C) -> D; a UserError if such images do not fit.
    dimensions: Callable[[tuple[int, ...]], int]
    # What the features depend on besides their name, such as the SHA-256 of a file; JSON-able.
    origin: dict[str, Any]
    # The flag, with its choices, of something in `origin` that was assumed since nobody said it.
    unsaid: str | None = None


def feature_extractor(
    name: str,
    *,
    inception: Path | None = None,
    lpips: Path | None = None,
    preprocessing: str | None = None,
    resolution: int | None = None,
    repeat_grey: bool = False,
) -> Features:
    """The features of a name.

    Args:
      name: "pixels" (each image flattened: for tiny images); "inception" (FID's pool3, D 2048);
        "vgg16" (the spatial mean of relu5_3, D 512); or "package.module:function", which is
        imported. That function takes images, float32 [N, H, W, C] in [-1, 1], and returns
        features [N, D]; whatever weights it needs it loads itself, once.
      inception, lpips: the files of `dmd-jax convert`, for "inception" and "vgg16".
      preprocessing: of "inception", as `models.judges.inception.preprocess` says; PREPROCESSING
        where it is None.
      resolution: what "vgg16" resizes images to, in pixels; 0 leaves them as they are, and None is
        RESOLUTION.
      repeat_grey: show grey images to "inception" and "vgg16" as three equal channels.

    Returns:
      Features; their vectors are float32 or float64. "inception" and "vgg16" run in float32 on
      this process's devices, the batch split over them.

    Raises:
      UserError: the name has another form, or cannot be imported, or is no function; a file is
        not given or not what it should be.
    """
    if name == "pixels":
        return Features(name, _pixels, None, lambda shape: math.prod(shape), {})
    if name == "inception":
        return _inception(inception, preprocessing, repeat_grey)
    if name == "vgg16":
        return _vgg16(lpips, resolution, repeat_grey)
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(
            f'features "{name}": unknown, expected "pixels", "inception", "vgg16" or '
            '"package.module:function"'
        )
    return _users_own(name, module_name, function_name)


def check_fit(features: Features, shape: tuple[int, ...]) -> None:
    """Raises a UserError if images (H, W, C) do not fit, or are too many numbers as features."""
    dimensions = features.dimensions(shape)
    if dimensions > MAX_DIMENSIONS:
        raise UserError(
            f'features "{features.name}" of images {shape} have {dimensions:,} dimensions; '
            f"expected at most {MAX_DIMENSIONS:,}, as --features inception and vgg16 have"
        )


def _pixels(images: np.ndarray, to_bytes: ToBytes = to_uint8) -> np.ndarray:
    images = np.asarray(images, np.float32)
    return images.reshape(len(images), -1)


def _inception(path: Path | None, preprocessing: str | None, repeat_grey: bool) -> Features:
    if path is None:
        raise UserError(f'features "inception" need --inception FILE; {how_to_make(INCEPTION)}')
    params = load_auxiliary(path, INCEPTION)
    unsaid = f"--inception-preprocessing {'|'.join(PREPROCESSINGS)}, or --protocol"
    unsaid = unsaid if preprocessing is None else None
    preprocessing = preprocessing or PREPROCESSING
    return _of_network(
        "inception",
        functools.partial(pool3, preprocessing=preprocessing),
        params,
        _resized_by_pil if preprocessing == "clean" else lambda pixels: pixels.astype(np.float32),
        lambda features: np.asarray(class_logits(params, features)),
        _origin(path, INCEPTION) | {"preprocessing": preprocessing, "repeat_grey": repeat_grey},
    )._replace(unsaid=unsaid)


def _resized_by_pil(pixels: np.ndarray) -> np.ndarray:
    return pil_bicubic(pixels, (SIDE, SIDE))


def _vgg16(path: Path | None, resolution: int | None, repeat_grey: bool) -> Features:
    if path is None:
        raise UserError(f'features "vgg16" need --lpips FILE; {how_to_make(LPIPS)}')
    unsaid = "--vgg-resolution R" if resolution is None else None
    resolution = RESOLUTION if resolution is None else resolution
    return _of_network(
        "vgg16",
        functools.partial(vgg16_features, resolution=resolution or None),
        load_auxiliary(path, LPIPS),
        bytes_to_float,
        None,
        _origin(path, LPIPS) | {"resolution": resolution, "repeat_grey": repeat_grey},
    )._replace(unsaid=unsaid)


def _origin(path: Path, kind: str) -> dict[str, Any]:
    metadata = describe_auxiliary(path, kind)
    return {key: metadata[key] for key in ("source", "source_sha256", "recognised")}


def _of_network(
    name: str,
    network: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prepare: Callable[[np.ndarray], np.ndarray],
    logits: Callable[[np.ndarray], np.ndarray] | None,
    origin: dict[str, Any],
) -> Features:
    """Features of a network that takes what `prepare` makes of uint8 [N, H, W, 3].

    Images become bytes first, as those behind published figures did.
    """
    run = on_devices(network, params, prepare)

    def dimensions(shape: tuple[int, ...]) -> int:
        *sides, channels = shape
        if channels == 1 and origin["repeat_grey"]:
            channels = 3
        if channels != 3:
            hint = "; --repeat-grey shows grey images as three" if channels == 1 else ""
            raise UserError(
                f'features "{name}": images of shape {shape}, expected three channels{hint}'
            )
        image = prepare(np.zeros((1, *sides, channels), np.uint8))
        return jax.eval_shape(network, params, image).shape[1]

    def extract(images: np.ndarray, to_bytes: ToBytes = to_uint8) -> np.ndarray:
        dimensions(images.shape[1:])
        pixels = to_bytes(images)
        repeats = 3 // pixels.shape[-1]
        return run(np.repeat(pixels, repeats, axis=-1))

    return Features(name, extract, logits, dimensions, origin)


def on_devices(
    function: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Callable[[np.ndarray], np.ndarray]:
    """images [N, …] -> rows [N, …], the batch split over this process's devices.

    Args:
      function: (params, a batch of what `prepare` makes of images on the host) -> rows.
    """
    devices = jax.local_devices()
    mesh = make_mesh(devices=devices)
    sharding = batch_sharding(mesh)
    params = place(params, jax.tree.map(lambda _: replicated(mesh), params))
    apply = jax.jit(function, out_shardings=sharding)
    largest = BATCH_PER_DEVICE * len(devices)

    def run(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), largest):
            rows = prepare(images[start : start + largest])
            # Powers of two, so that rests of all lengths share a few compiled programs.
            per_device = 1 << (-(-len(rows) // len(devices)) - 1).bit_length()
            batch = jax.device_put(pad_rows(rows, per_device * len(devices)), sharding)
            parts.append(np.asarray(apply(params, batch))[: len(rows)])
        return np.concatenate(parts)

    return run


def _users_own(name: str, module_name: str, function_name: str) -> Features:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(
            f'features "{name}": {module_name} cannot be imported '
            f"({type(error).__name__}: {first_line(error)}), expected a module on the Python path"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f'features "{name}": {module_name} has no function "{function_name}", '
            "expected one that takes images and returns features"
        )
    extract = _checked(name, function)
    file = getattr(module, "__file__", None) or ""
    return Features(
        name,
        extract,
        None,
        lambda shape: extract(np.zeros((1, *shape), np.float32)).shape[1],
        {"module_sha256": file_sha256(file)} if Path(file).is_file() else {},
    )


def _checked(name: str, function: Callable) -> Callable[..., np.ndarray]:
    def extract(images: np.ndarray, to_bytes: ToBytes = to_uint8) -> np.ndarray:
        images = np.asarray(images, np.float32)
        features = np.asarray(function(images))
        if features.ndim != 2 or len(features) != len(images) or features.dtype.kind in "OSUc":
            raise UserError(
                f'features "{name}": returned shape {features.shape} of {features.dtype} for '
                f"{len(images)} images, expected ({len(images)}, D) of numbers"
            )
        return features if features.dtype == np.float64 else features.astype(np.float32)

    return extract
