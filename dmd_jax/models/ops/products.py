"""Products whose operands are rounded to bfloat16 and whose float32 sums are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Product = Callable[..., jax.Array]  # (x, kernel, preferred_element_type=) -> their product


def product_in(product: Product, x: jax.Array, kernel: jax.Array, result: Any = None) -> jax.Array:
    """product(x, kernel) as an array of dtype `result`; None: of the operands' dtype.

    Float32 sums of bfloat16 operands are returned as they are. Their gradient is rounded to
    bfloat16 before it is multiplied, so that no product takes the passes of float32's.
    """
    if result in (None, x.dtype):
        return product(x, kernel)
    return _float32_sums(product, x, kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _float32_sums(product: Product, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, kernel, preferred_element_type=jnp.float32)


@_float32_sums.defjvp
def _tangent(
    product: Product, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = product(dx, kernel) + product(x, dkernel)
    # The product itself, which policies of jax.checkpoint see, and not the call around it.
    return product(x, kernel, preferred_element_type=jnp.float32), tangent.astype(jnp.float32)


def rounded_operands(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: jnp.dtype, result: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A layer's operands in `dtype`, and its bias in the dtype of the result; None: that, too."""
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=dtype)
    return x, kernel, None if bias is None else bias.astype(result or x.dtype)


def linear(
    features: int, *, name: str | None = None, dtype: jnp.dtype, result: Any = None, **options: Any
) -> nn.Dense:
    """A Dense layer that computes in `dtype` and hands on `result`, see `product_in`."""

    def dot(x, kernel, numbers, precision=None):
        product = functools.partial(lax.dot_general, dimension_numbers=numbers, precision=precision)
        return product_in(product, x, kernel, result)

    return nn.Dense(
        features,
        dtype=dtype,
        name=name,
        dot_general=dot,
        promote_dtype=functools.partial(rounded_operands, result=result),
        **options,
    )
