"""How a parameter of ours is named and laid out in PyTorch.

The trees of Stable Diffusion's networks mirror PyTorch's modules, so that one rule does for all:
`down_blocks_0/resnets_1/conv1/kernel` is `down_blocks.0.resnets.1.conv1.weight`.
"""

from __future__ import annotations

import re

import numpy as np

# TimestepEmbedding's two layers have such names in PyTorch too; everywhere else it is an index.
_INDEX = re.compile(r"(?<!^linear)_(\d+)$")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Of kernels, by their dimensions: HWIO and OIHW, [in, out] and [out, in].
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}


def torch_key(path: str) -> str:
    """PyTorch's key of the parameter at "a/b_0/kernel": "a.b.0.weight"."""
    *modules, leaf = path.split("/")
    return ".".join((*(_INDEX.sub(r".\1", name) for name in modules), _LEAVES.get(leaf, leaf)))


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of the parameter at `path`, which has `shape` here."""
    return tuple(shape[axis] for axis in _axes(path, len(shape), _TO_TORCH))


def from_torch(path: str, array: np.ndarray) -> np.ndarray:
    """PyTorch's array as the parameter at `path`: our layout, float32, contiguous."""
    array = np.transpose(array, _axes(path, array.ndim, _FROM_TORCH))
    return np.array(array, dtype=np.float32, order="C")


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The parameter at `path` in PyTorch's layout, contiguous, of the same dtype."""
    array = np.asarray(array)
    return np.array(np.transpose(array, _axes(path, array.ndim, _TO_TORCH)), order="C")


def _axes(path: str, ndim: int, kernels: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The transposition of a parameter; only kernels lie otherwise."""
    is_kernel = path.rpartition("/")[2] == "kernel"
    return kernels.get(ndim, tuple(range(ndim))) if is_kernel else tuple(range(ndim))
