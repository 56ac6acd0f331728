"""Folders that a conversion makes: whole or not at all, and not a second time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dmd_jax.errors import UserError, first_line
from dmd_jax.models import complete

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def resolved(out: Path) -> Path:
    """The path of the folder to make, links followed. Raises a UserError if they lead nowhere."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error


def converted(
    out: Path, sha256: str, parts: Sequence[str] = (), files: Sequence[str] = ()
) -> dict[str, Any] | None:
    """The complete network of the weights folder `out`, where it holds this very source.

    Args:
      sha256: of the source. parts: folders in `out` that are weights folders too. files: what else
        is in `out`.

    Returns:
      None where the folder is new or empty.

    Raises:
      UserError: it has another content, or a file is missing or damaged.
    """
    try:
        config = json.loads((out / _CONFIG).read_text(encoding="utf-8"))
        found = config["source"]["sha256"]
        network = complete(config["network"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        found = None
    if found != sha256:
        check_free(out)
        return None
    of_parts = [f"{part}/{file}" for part in parts for file in (_CONFIG, _WEIGHTS)]
    for name in (_WEIGHTS, *of_parts, *files):
        _check_readable(out, name)
    return network


def _check_readable(out: Path, name: str) -> None:
    """Raises a UserError unless the file of this name can be read.

    Of weights that is the header, which also says how long the file has to be.
    """
    path = out / name
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{out} holds part of this source, but {name} cannot be read ({first_line(error)}); "
            "expected a new or empty folder"
        ) from error


def check_free(out: Path) -> None:
    """Raises a UserError unless `out` is a new or an empty folder."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise UserError(f"{out} cannot be read: {first_line(error)}") from error
    raise UserError(f"{out} exists and holds something else; expected a new or empty folder")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies the content of files into a folder that is made for them."""
    folder.mkdir()
    for path in files:
        shutil.copyfile(path, folder / path.name)


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
