"""Image files in a folder or a zip: their names, their bytes, their pixels.

Names are relative to the folder or zip, with "/" between the parts. Hidden files (a part begins
with a dot) and macOS's __MACOSX are passed over; so is everything that has no suffix of an image
and is not the dataset.json at the top, which is counted on stderr. A path that leads out of the
folder or zip is an error, never followed.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dmd_jax.data.pixels import SUFFIXES, decode_pixels
from dmd_jax.data.png import SIGNATURE, decode_png
from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.real_files import check_real_file
from dmd_jax.storage.untrusted import read_member

LABEL_FILE = "dataset.json"
LONGEST_IMAGE = 64 << 20  # bytes of a file; a picture of the most pixels fits uncompressed


class ImageFolder:
    """The image files below a folder. `names`: sorted; `has_label_file`: dataset.json is there.

    Symbolic links to folders are not walked into: what they show would count twice.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.names, self.has_label_file = _select(path, self._walk())
        except OSError as error:
            raise UserError(f"{path}: cannot be listed ({first_line(error)})") from error

    def _walk(self) -> Iterable[str]:
        root = os.path.realpath(self.path)
        prefixes = [""]
        while prefixes:
            prefix = prefixes.pop()
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if _is_hidden(name):
                        continue
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        if os.path.commonpath((root, target)) != root:
                            raise UserError(
                                f"{self.path}: the link {name} leads out of the folder, to {target}"
                            )
                    if entry.is_dir(follow_symlinks=False):
                        prefixes.append(name + "/")
                    else:
                        yield name

    def read(self, name: str, longest: int = LONGEST_IMAGE) -> bytes:
        """The content of a file; a UserError if it has more than `longest` bytes."""
        path = self.path / name
        check_real_file(path, "an image" if name != LABEL_FILE else "EDM's labels")
        try:
            with path.open("rb") as file:
                content = file.read(longest + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
        if len(content) > longest:
            raise UserError(f"{path}: has more than {longest:,} bytes; expected fewer")
        return content


class ImageZip:
    """The image members of a zip, read in place; the same attributes as ImageFolder.

    May be pickled and forked: every process opens its own handle, as a shared one would also
    share its position in the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._archive, self._archive_pid = None, None
        self.names, self.has_label_file = _select(path, self._open().namelist())

    def _open(self) -> zipfile.ZipFile:
        if self._archive_pid != os.getpid():
            try:
                self._archive = zipfile.ZipFile(self.path)
            except Exception as error:  # zipfile lets struct.error and others through
                raise UserError(
                    f"{self.path}: cannot be read as a zip ({first_line(error)})"
                ) from error
            self._archive_pid = os.getpid()
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_archive_pid": None}

    def read(self, name: str, longest: int = LONGEST_IMAGE) -> bytes:
        """The content of a member; a UserError if it has more than `longest` bytes."""
        return read_member(self._open(), name, str(self.path), longest=longest)


def decode_image(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, 1 or 3] of the content of an image file; see `decode_pixels`."""
    return (decode_png if data.startswith(SIGNATURE) else decode_pixels)(data, where)


def _select(path: Path, names: Iterable[str]) -> tuple[list[str], bool]:
    images, has_label_file, others = set(), False, Counter()
    for name in names:
        if leaves_root(name):
            raise UserError(f"{path}: the name {name!r} leads out of it, expected paths below it")
        if _is_hidden(name):
            continue
        if os.path.splitext(name)[1].lower() in SUFFIXES:
            images.add(name)
        elif name == LABEL_FILE:
            has_label_file = True
        elif name.endswith("/" + LABEL_FILE):
            # Passing it over would silently take classes from the folder names instead.
            raise UserError(f"{path}: {name} was found, expected {LABEL_FILE} at the top")
        elif not name.endswith("/"):  # as a zip writes folders
            others[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} of {ascii(suffix)[1:-1]}" for suffix, count in others.items())
        print(f"{path}: {len(images)} image files are read; passed over: {counts}", file=sys.stderr)
    return sorted(images), has_label_file


def leaves_root(name: str) -> bool:
    """Whether a relative name leads out of the folder or zip that it is written in."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", parts[0]) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
