"""A folder that somebody else wrote: files are read inside it, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import local_path
from dmd_jax.storage.real_files import answered, check_real_file, is_there
from dmd_jax.storage.safe_pickle import shown
from dmd_jax.storage.untrusted import read_json

_LARGEST_JSON = 64 * 1024 * 1024  # bytes; a tokenizer's vocabulary has one
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class GivenFolder:
    """The files of a folder by their relative names.

    Args:
      path: the folder.
      name: under which a conversion records it.
      root: what no file may lie outside of, symbolic links followed (default: the folder). The
        hub's cache links from a snapshot to files beside it, so there it is the model's cache.
    """

    def __init__(self, path: Path, name: str, root: Path | None = None):
        self.path, self.name = path, name
        self._root = (_cache_of(path) or path).resolve() if root is None else root

    def __truediv__(self, name: str) -> GivenFolder:
        return GivenFolder(self.path / name, f"{self.name}/{name}", self._root)

    def has(self, name: str) -> bool:
        """Whether there is something of this name, a link that leads nowhere included."""
        path = self.path / name
        return answered(lambda: is_there(path))

    def file(self, name: str) -> Path:
        """The path of a file.

        Raises:
          UserError: there is none, or `name` or a link leads out of the folder.
        """
        path = self.path / name
        try:
            inside = path.resolve().is_relative_to(self._root)
            is_file = path.is_file()
            there = path.exists()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.path}: {shown(name)} is no file: {first_line(error)}"
            ) from error
        if there and not inside:
            raise UserError(f"{self.path}: {shown(name)} leads out of the folder; expected a file")
        if not is_file and not path.is_symlink():
            raise UserError(
                f"{self.path} has no file {shown(name)}; expected one, as diffusers and "
                "transformers write it"
            )
        check_real_file(path, "a file as diffusers and transformers write it")
        return path

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file.

        Raises:
          UserError: as `file`; or it is too large, or no JSON object.
        """
        path = self.file(name)
        content = read_json(path, "a JSON object", longest=_LARGEST_JSON)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no JSON object; expected one")
        return content


def find_folder(
    source: str,
    *,
    revision: str | None,
    patterns: Sequence[str],
    more: Callable[[GivenFolder], Sequence[str]],
) -> GivenFolder:
    """The folder of this path, or else the model of this id on the Hugging Face hub.

    Args:
      source: a path; or "owner/name", which is downloaded where the local cache lacks it.
      revision: a branch, tag or commit of the hub's.
      patterns: of the files to download. more: of what a folder with these still needs.

    Raises:
      UserError: neither a folder nor a hub id, or neither the hub nor the cache has it.
    """
    path = local_path(source)
    if answered(path.is_dir):
        if revision is not None:
            raise UserError(f"--revision {revision}: {source} is a folder; expected a hub id")
        return GivenFolder(path, path.resolve().name)
    if answered(path.exists) or not _HUB_ID.fullmatch(source):
        raise UserError(f"{source}: no such folder; expected one, or a hub id (owner/name)")
    folder = _download(source, revision, patterns)
    needed = more(folder)
    return _download(source, revision, needed) if needed else folder


def _download(hub_id: str, revision: str | None, patterns: Sequence[str]) -> GivenFolder:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{hub_id}: no such folder, and a hub id needs the package huggingface_hub; "
            'expected a folder, or pip install "dmd_jax[text]"'
        ) from error
    try:
        path = snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # its own kinds, and those of what carries it over the network
        raise UserError(
            f"{hub_id}: no such folder, and the hub did not give it ({first_line(error)}); "
            "expected a folder, or a hub id with a network or in the local cache"
        ) from error
    return GivenFolder(Path(path), hub_id)


def _cache_of(path: Path) -> Path | None:
    """The model's folder in the hub's cache, whose links lead from snapshots/ to blobs/."""
    model = path.absolute().parent.parent
    is_snapshot = path.absolute().parent.name == "snapshots" and (model / "blobs").is_dir()
    return model if is_snapshot else None
