"""Reference statistics as EDM2 publishes them: a pickle, which is read here and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dmd_jax.errors import UserError, first_line
from dmd_jax.evaluation.features import Features
from dmd_jax.storage import safe_pickle
from dmd_jax.storage.pickled_arrays import NUMPY, PickledArray
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.safe_pickle import shown

METRIC = "fid"  # of those in the file, the one whose features there are here
PREPROCESSING = "tensorflow"  # of METRIC's detector, NVIDIA's
_COUNT = "num_images"


def read_statistics(path: Path, features: list[Features]) -> dict[str, Any]:
    """The statistics of Inception's features.

    The file holds {"fid": {"mu" [2048], "sigma" [2048, 2048]}, "fd_dinov2": {…}} and perhaps
    "num_images" (arXiv 2312.02696, as released).

    Returns:
      {"mu": array, "sigma": array} and, where the file has it, "count".

    Raises:
      UserError: the file cannot be read or has another form; or `features` are not those of
        NVIDIA's detector.
    """
    check_real_file(path, "EDM2's statistics")
    try:
        with path.open("rb") as file:
            content = safe_pickle.load(file, allowed=NUMPY, where=str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {shown(content)}; expected EDM2's dict of statistics")
    metrics = ", ".join(shown(key) for key in content if key != _COUNT) or "nothing"
    if METRIC not in content:
        raise UserError(f"{path} holds {metrics}; expected {METRIC}, Inception's statistics")
    for one in features:
        if one.name != "inception":
            raise UserError(
                f"{path} holds {metrics}, but no statistics of {one.name}; expected --features "
                f"inception, which {METRIC} is of"
            )
        if one.origin["preprocessing"] != PREPROCESSING:
            raise UserError(
                f"{path}: {METRIC} is of NVIDIA's detector; expected --protocol edm, or "
                f"--inception-preprocessing {PREPROCESSING} in place of "
                f"{one.origin['preprocessing']}"
            )
    moments = content[METRIC]
    held = {name: _array(moments, name, path) for name in ("mu", "sigma")}
    count = content.get(_COUNT)
    if count is None:
        return held
    if type(count) is not int:
        raise UserError(f"{path}: {_COUNT} is {shown(count)}; expected a whole number")
    return held | {"count": count}


def _array(moments: Any, name: str, path: Path) -> np.ndarray:
    array = moments.get(name) if isinstance(moments, dict) else None
    # One that its pickle never filled has no content.
    if not isinstance(array, PickledArray) or not hasattr(array, "array"):
        raise UserError(f"{path}: {METRIC} has no array {name}; expected mu and sigma")
    return array.array
