"""The precision of float32 products: of every matmul and convolution, on every device.

JAX's own default is a device's fastest: one pass of bfloat16 on TPU, TF32 on NVIDIA's GPUs from
Ampere on. Here every network says a precision itself, whatever JAX's default is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

# What `config.matmul_precision` may be. "highest" is float32 (six passes of bfloat16 on TPU),
# "high" about 16 bits of mantissa (three passes; TF32 on GPUs), "default" the device's fastest.
# A CPU computes float32 in all of them, and products of bfloat16 arrays are the same in all.
PRECISIONS = ("highest", "high", "default")


def at_precision(precision: str) -> Any:
    """A context in which products are traced at that precision, one of PRECISIONS.

    Their gradients are at it as well, wherever those are traced, but for functions that bring their
    own (see `both_ways`).
    """
    return jax.default_matmul_precision(precision)


def both_ways(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays, whose products and those of its gradient are at that precision.

    For one whose gradient is a function of its own, which is traced after the function has returned
    and so outside of the context that it was called in.
    """

    @jax.custom_vjp
    def called(*args: Any) -> Any:
        with at_precision(precision):
            return function(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        with at_precision(precision):
            return jax.vjp(function, *args)

    def backward(pullback: Any, cotangents: Any) -> Any:
        with at_precision(precision):
            return pullback(cotangents)

    called.defvjp(forward, backward)
    return called


def products(result: Mapping[str, str]) -> str:
    """What a result's "compute_dtype" and "matmul_precision" say, such as "float32, highest"."""
    dtype = result["compute_dtype"]
    # Without the second where no product of importance depends on it.
    return f"{dtype}, {result['matmul_precision']}" if dtype == "float32" else dtype


def at_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose products are at the precision that its object's field `precision` says."""

    @functools.wraps(method)
    def traced(self: Any, *args: Any, **options: Any) -> Any:
        with at_precision(self.precision):
            return method(self, *args, **options)

    return traced
