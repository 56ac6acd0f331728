"""The frozen networks that judge images, each on disk as one safetensors file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dmd_jax.errors import UserError
from dmd_jax.models.judges.inception import inception_template
from dmd_jax.models.judges.lpips import lpips, lpips_template
from dmd_jax.storage.bucket_copies import local_copy
from dmd_jax.storage.files import replacing
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.strict import check_names_and_shapes
from dmd_jax.storage.weights import params_sha256

LPIPS, INCEPTION = "lpips_vgg16", "fid_inception"
_TEMPLATES = {LPIPS: lpips_template, INCEPTION: inception_template}
# The LPIPS distance of `probe_pair` with the published weights, average pooling, no resizing. The
# tests compute it without this project's networks, from the formula in float64.
PROBE_DISTANCE = 0.435874
_TOLERANCE = 1e-5
_HOW_TO_MAKE = {
    LPIPS: 'make one with: pip install "dmd_jax[lpips]" && dmd-jax convert lpips lpips.safetensors',
    INCEPTION: (
        "make one from pytorch-fid's weights with: "
        "dmd-jax convert inception pt_inception-2015-12-05-6726825d.pth inception.safetensors"
    ),
}


def check_free(path: Path) -> None:
    """Raises a UserError if there is something under this name already."""
    if Path(path).exists():
        raise UserError(f"{path} exists already; expected a name that is free")


def how_to_make(kind: str) -> str:
    """What to type for a file of this kind, to end an error message with."""
    return _HOW_TO_MAKE[kind]


def save_auxiliary(
    path: Path,
    kind: str,
    params: Any,
    *,
    source: str,
    source_sha256: str,
    recognised: bool = True,
) -> None:
    """Writes a network's parameters (keys "a/b/c") and where they come from.

    Args:
      path: the file, which must not exist.
      kind: LPIPS or INCEPTION.
      params: nested dict of arrays, of the kind's template.
      source, source_sha256: name and SHA-256 of the file that they were read from.
      recognised: whether they are known to be the published weights.

    Raises:
      UserError: the file exists or cannot be written, or params have other names or shapes.
    """
    check_free(path)
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in _flat(params).items()}
    _check(kind, {name: leaf.shape for name, leaf in flat.items()}, f"parameters for {path}")
    metadata = {
        "kind": kind,
        "source": source,
        "source_sha256": source_sha256,
        "recognised": "yes" if recognised else "no",
        "params_sha256": params_sha256(flax.traverse_util.unflatten_dict(flat, sep="/")),
    }
    contiguous = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written: {error}") from error


def load_auxiliary(path: Path, kind: str) -> dict[str, Any]:
    """Reads what `save_auxiliary` wrote.

    Returns:
      A nested dict of float32 NumPy arrays, of the kind's template.

    Raises:
      UserError: no such file, not a file of ours or of another kind, other names or shapes,
        damaged, or an LPIPS that is not the published one (see check_published). The message says
        how to make the file.
    """
    metadata = describe_auxiliary(path, kind)
    try:
        with safe_open(local_copy(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _check(kind, {name: s.get_shape() for name, s in slices.items()}, str(path))
            types = {s.get_dtype() for s in slices.values()}
            if types != {"F32"}:
                raise UserError(f"{path} holds {', '.join(sorted(types))}; expected F32 alone")
            flat = {name: file.get_tensor(name) for name in slices}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; {how_to_make(kind)}") from error
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    if metadata["params_sha256"] != params_sha256(params):
        raise UserError(
            f"{path} is damaged: its parameters are not of the recorded SHA-256 "
            f"{metadata['params_sha256']}; {how_to_make(kind)}"
        )
    if kind == LPIPS:  # which file of an Inception is the published one, only its source tells
        check_published(params, str(path))
    return params


def describe_auxiliary(path: Path, kind: str) -> dict[str, str]:
    """The file's metadata, for a record of what judged: all values are strings.

    Returns:
      "kind"; "source" and "source_sha256", of the file that it was converted from; "recognised",
      "yes" where that is known to hold the published weights, else "no"; "params_sha256".

    Raises:
      UserError: no such file, or not a file of ours, or of another kind.
    """
    check_real_file(path, f"a file of ours; {how_to_make(kind)}")
    try:
        with safe_open(local_copy(path), framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; {how_to_make(kind)}") from error
    if metadata.get("kind") != kind:
        raise UserError(
            f"{path} is of kind {metadata.get('kind')!r}; expected {kind!r}; {how_to_make(kind)}"
        )
    missing = {"source", "source_sha256", "recognised", "params_sha256"} - metadata.keys()
    if missing:
        raise UserError(f"{path} does not record {', '.join(sorted(missing))}; {how_to_make(kind)}")
    return metadata


def probe_pair() -> tuple[np.ndarray, np.ndarray]:
    """Two images of waves, float32 [1, 32, 32, 3] in [-1, 1], the same on every machine."""
    row, column, channel = np.indices((32, 32, 3))
    x = np.sin(0.7 * row + 0.3 * column * (channel + 1))
    y = np.cos(0.2 * row * (channel + 1) - 0.5 * column)
    return x[None].astype(np.float32), y[None].astype(np.float32)


def check_published(params: Any, where: str) -> None:
    """Refuses weights of the right shapes that are not the published ones.

    Raises:
      UserError: their distance of `probe_pair` is not PROBE_DISTANCE; begins with `where`.
    """
    measure = jax.jit(functools.partial(lpips, resolution=None))
    distance = float(measure(params, *probe_pair())[0])
    # NaN fails the comparison, and so is refused.
    if not abs(distance - PROBE_DISTANCE) <= _TOLERANCE:
        raise UserError(
            f"{where}: not the published weights of LPIPS v0.1 with VGG16: a known pair of images "
            f"is {distance:.5f} apart, expected {PROBE_DISTANCE:.5f}; {how_to_make(LPIPS)}"
        )


def _flat(params: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _check(kind: str, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    expected = {name: leaf.shape for name, leaf in _flat(_TEMPLATES[kind]()).items()}
    check_names_and_shapes(shapes, expected, f"{where} is not a {kind} network")
