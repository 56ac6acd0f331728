"""Features that a Fréchet distance is measured in: raw pixels, or any network of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

from dmd_jax.errors import UserError

FeatureExtractor = Callable[[np.ndarray], np.ndarray]


def feature_extractor(name: str) -> FeatureExtractor:
    """The function that turns images into features.

    Args:
      name: "pixels" (each image flattened: for tiny images), or "package.module:function", which
        is imported. That function takes images, float32 [N, H, W, C] in [-1, 1], and returns
        features [N, D]; whatever weights it needs it loads itself, once.

    Returns:
      fn(images [N, H, W, C]) -> features [N, D], float32 or float64. It raises a UserError if the
      user's function returns anything but N rows of numbers.

    Raises:
      UserError: the name has another form, or cannot be imported, or is no function.
    """
    if name == "pixels":
        return _pixels
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(
            f'features "{name}": unknown, expected "pixels" or "package.module:function"'
        )
    return _checked(name, _imported(name, module_name, function_name))


def _pixels(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, np.float32)
    return images.reshape(len(images), -1)


def _imported(name: str, module_name: str, function_name: str) -> Callable:
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f'features "{name}": {module_name} cannot be imported ({reason}), '
            "expected a module on the Python path"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f'features "{name}": {module_name} has no function "{function_name}", '
            "expected one that takes images and returns features"
        )
    return function


def _checked(name: str, function: Callable) -> FeatureExtractor:
    def extract(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images, np.float32)
        features = np.asarray(function(images))
        if features.ndim != 2 or len(features) != len(images) or features.dtype.kind in "OSUc":
            raise UserError(
                f'features "{name}": returned shape {features.shape} of {features.dtype} for '
                f"{len(images)} images, expected ({len(images)}, D) of numbers"
            )
        return features if features.dtype == np.float64 else features.astype(np.float32)

    return extract
