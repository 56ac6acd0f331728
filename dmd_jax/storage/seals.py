"""JSON files that carry a digest of themselves, so that a changed one is not believed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dmd_jax.errors import UserError
from dmd_jax.storage.files import write_json
from dmd_jax.storage.untrusted import LONGEST_JSON, read_json

_SEAL = "sha256"


def digest(content: dict[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of a JSON object with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The same with the key "sha256": that of the rest as JSON with sorted keys."""
    return {**content, _SEAL: digest(content)}


def write_sealed(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes `sealed(content)` as JSON. Raises an OSError where that cannot be done."""
    write_json(path, sealed(content))


def unsealed(content: Any) -> tuple[dict[str, Any], bool]:
    """The content without its seal, and whether it had one.

    Raises:
      ValueError: it is no JSON object, or its seal is that of another content.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not a JSON object")
    content = dict(content)
    seal = content.pop(_SEAL, None)
    if seal is not None and seal != digest(content):
        raise ValueError("it was changed since it was written: its sha256 is that of other content")
    return content, seal is not None


def read_sealed(
    path: Path, expected: str, *, longest: int = LONGEST_JSON
) -> tuple[dict[str, Any], bool]:
    """A JSON object from a file, without its seal, and whether it had one.

    Args:
      expected, longest: as of `untrusted.read_json`.

    Raises:
      UserError: as `untrusted.read_json`; it is no JSON object, or was changed since it was
        written.
    """
    content = read_json(path, expected, longest=longest)
    try:
        return unsealed(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; expected {expected}") from error
