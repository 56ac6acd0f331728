"""Stand-ins for NumPy's globals in a pickle (see safe_pickle): arrays, dtypes and scalars."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

_MOST_DIMENSIONS = 32


class PickledDtype:
    """A dtype of plain numbers: `dtype` once it is built."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise ValueError("a dtype that is not of plain numbers")
        self.dtype = np.dtype(code)

    def pickle_state(self, state: Any) -> None:
        """(version, byte order, ...); the rest describes records, which these dtypes are not."""
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError("a dtype without a byte order")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """An array: `array`, read-only, once it is built."""

    array: np.ndarray

    def pickle_state(self, state: Any) -> None:
        """(version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, content = state
        if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("an array of no shape")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
            raise ValueError("an array of no shape")
        if not isinstance(content, bytes | bytearray):
            raise ValueError(f"an array made of a {type(content).__name__}")
        if len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of {math.prod(shape):,} elements in {len(content):,} bytes")
        flat = np.frombuffer(memoryview(content).toreadonly(), dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: Any, shape: Any, code: Any) -> PickledArray:
    return PickledArray()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    """How pickle protocol 5 has an array."""
    if order not in ("C", "F"):
        raise ValueError("an array without an order")
    array = PickledArray()
    array.pickle_state((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: PickledDtype, content: bytes) -> int | float | bool:
    if len(content) != dtype.dtype.itemsize:
        raise ValueError("a number of another size than its dtype")
    return np.frombuffer(content, dtype.dtype)[0].item()


# NumPy 1 and 2 write different module names.
NUMPY = {
    ("numpy", "dtype"): PickledDtype,
    ("numpy", "ndarray"): PickledArray,
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
