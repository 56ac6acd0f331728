"""Inception's weights as they were drawn for fid_inception.npz: there is no published file here."""

from __future__ import annotations

import ast
import zlib

import numpy as np


def drawn_state_dict(arrays) -> dict[str, np.ndarray]:
    """The state dict of the reference: a standard normal drawn per key, and scaled by its kind."""
    return {
        str(key): _drawn(str(key), ast.literal_eval(str(shape)))
        for key, shape in zip(arrays["keys"], arrays["shapes"])
    }


def _drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(n)
    if key.endswith(("running_mean", "bias")):
        return np.float32(0.1) * n
    if len(shape) == 1:
        return 1 + np.float32(0.1) * n
    return n * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))
