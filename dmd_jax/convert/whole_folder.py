"""Folders that a conversion makes: whole or not at all, and not a second time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmd_jax.errors import UserError, first_line
from dmd_jax.models import complete


def converted(out: Path, sha256: str, parts: Sequence[str] = ()) -> dict[str, Any] | None:
    """The complete network of the weights folder `out`, where it holds this very source.

    Args:
      sha256: of the source. parts: folders in `out` that are weights folders too.

    Returns:
      None where the folder is new or empty.

    Raises:
      UserError: it has another content.
    """
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        whole = all((out / part / "model.safetensors").is_file() for part in ("", *parts))
        if config["source"]["sha256"] == sha256 and whole:
            return complete(config["network"])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass
    check_free(out)
    return None


def check_free(out: Path) -> None:
    """Raises a UserError unless `out` is a new or an empty folder."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise UserError(f"{out} cannot be read: {first_line(error)}") from error
    raise UserError(f"{out} exists and holds something else; expected a new or empty folder")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a new folder to write to, which becomes `out` at the end, or nothing at all.

    Args:
      out: new or empty.

    Raises:
      UserError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a command that was killed
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
