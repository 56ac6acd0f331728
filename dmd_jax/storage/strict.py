"""Names, shapes and types of a file's arrays: what is expected, or a line with the difference."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from dmd_jax.errors import UserError

Shape = tuple[int, ...]
_SHOWN = 20


def check_names_and_shapes(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str
) -> None:
    """Raises a UserError that begins with `where` and lists what is missing, extra, misshapen."""
    lists = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} {tuple(found[name])}, expected {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for kind, names in lists.items()
        if names
    ]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def check_floating(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises a UserError, beginning with `where`, that names the first array of another type."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{where}: {name} has type {array.dtype.name}; expected floating point")
