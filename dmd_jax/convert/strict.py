"""Names and shapes of a file's arrays: equal to what is expected, or a list of the differences."""

from __future__ import annotations

from collections.abc import Mapping

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
