"""The products of a function, its matmuls and convolutions, as its jaxpr has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

PRODUCTS = ("dot_general", "conv_general_dilated")


class Product(NamedTuple):
    dtypes: tuple[str, ...]  # of both operands
    precision: tuple[str, ...]  # of both, such as "HIGHEST"; JAX's default is "DEFAULT"
    name: str  # the modules that it is made in, with slashes between them


def products_of(function: Callable[..., Any], *args: Any) -> list[Product]:
    """Those of a function of arrays or ShapeDtypeStructs, whatever it calls, each once."""
    return list(_of(jax.make_jaxpr(function)(*args).jaxpr, ""))


def _of(jaxpr: core.Jaxpr, within: str) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name = f"{within}/{equation.source_info.name_stack}"
        if equation.primitive.name in PRODUCTS:
            given = equation.params["precision"]
            both = given if isinstance(given, tuple) else (given, given)
            yield Product(
                tuple(str(variable.aval.dtype) for variable in equation.invars),
                tuple("DEFAULT" if one is None else one.name for one in both),
                name,
            )
        for value in equation.params.values():
            for one in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(one, "jaxpr", one)
                if isinstance(inner, core.Jaxpr):
                    yield from _of(inner, name)
