"""PNG files in a folder or a zip: their names, their bytes, their labels, their pixels.

Names are relative to the folder or zip, with "/" between the parts. Hidden files (a part begins
with a dot) and macOS's __MACOSX are passed over; so is everything that is neither a PNG nor the
dataset.json at the top, which is counted on stderr. A path that leads out of the folder or zip is
an error, never followed.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmd_jax.errors import UserError

LABEL_FILE = "dataset.json"


class PngFolder:
    """The PNG files below a folder. `names`: sorted; `has_label_file`: dataset.json is there.

    Symbolic links to folders are not walked into: what they show would count twice.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.names, self.has_label_file = _select(path, self._walk())
        except OSError as error:
            raise UserError(f"{path}: cannot be listed ({error})") from error

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

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise UserError(f"{path}: expected a regular file")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error


class PngZip:
    """The PNG members of a zip, read in place; the same attributes as PngFolder.

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
                raise UserError(f"{self.path}: cannot be read as a zip ({error})") from error
            self._archive_pid = os.getpid()
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_archive_pid": None}

    def read(self, name: str) -> bytes:
        try:
            return self._open().read(name)
        except UserError:
            raise
        except Exception as error:  # bad checksum, encryption, unknown compression, zlib.error, …
            raise UserError(f"{self.path}: {name} cannot be read ({error})") from error


def read_labels(files: PngFolder | PngZip) -> np.ndarray | None:
    """One integer label for each of `files.names`, or None if the images have no labels.

    From EDM's dataset.json ({"labels": [["dir/img.png", 6], …]}, or null for none) if it is
    there. Otherwise the folder that an image lies in, below what all images have in common,
    names its class, and the classes are numbered in sorted order. Where every name is a whole
    number of at most six digits, these numbers are the labels.
    """
    if files.has_label_file:
        return _labels_from_json(files)
    return _labels_from_folders(files)


def decode_png(data: bytes, where: str) -> np.ndarray:
    """uint8 [H, W, 1] of a grey PNG, [H, W, 3] of a colour one. `where` names it in errors."""
    try:
        with Image.open(io.BytesIO(_without_texts(data)), formats=["PNG"]) as image:
            # One bit per pixel and palettes are only ways to store grey and RGB.
            mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
            if mode not in ("L", "RGB"):
                raise UserError(
                    f"{where}: a PNG of mode {image.mode}, expected 8-bit grey or RGB without alpha"
                )
            pixels = np.asarray(image.convert(mode))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: cannot be read as a PNG (it does not begin like one)") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise UserError(f"{where}: cannot be read as a PNG ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks of text, colour profile and EXIF, which change no pixel here.

    Pillow unpacks them at once and refuses an image whose text is large. What is no sequence of
    chunks comes back as it is.
    """
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        if end > len(data):
            return data
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept) if place == len(data) else data


def _select(path: Path, names: Iterable[str]) -> tuple[list[str], bool]:
    pngs, has_label_file, others = set(), False, Counter()
    for name in names:
        if _leaves_root(name):
            raise UserError(f"{path}: the name {name!r} leads out of it, expected paths below it")
        if _is_hidden(name):
            continue
        if name.lower().endswith(".png"):
            pngs.add(name)
        elif name == LABEL_FILE:
            has_label_file = True
        elif name.endswith("/" + LABEL_FILE):
            # Passing it over would silently take classes from the folder names instead.
            raise UserError(f"{path}: {name} was found, expected {LABEL_FILE} at the top")
        elif not name.endswith("/"):  # as a zip writes folders
            others[os.path.splitext(name)[1].lower() or "no suffix"] += 1
    if others:
        counts = ", ".join(f"{count} of {ascii(suffix)[1:-1]}" for suffix, count in others.items())
        print(f"{path}: {len(pngs)} PNG files are read; passed over: {counts}", file=sys.stderr)
    return sorted(pngs), has_label_file


def _leaves_root(name: str) -> bool:
    """Whether a relative name leads out of the folder or zip that it is written in."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", parts[0]) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _labels_from_folders(files: PngFolder | PngZip) -> np.ndarray | None:
    folders = [name.split("/")[:-1] for name in files.names]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 - lists of names, not strings
    if all(len(folder) == depth for folder in folders):
        return None
    for name, folder in zip(files.names, folders):
        if len(folder) == depth:
            raise UserError(
                f"{files.path}: {name} lies beside the sub-folders that name the classes; "
                f"expected every image in one of them, or a {LABEL_FILE}"
            )
    classes = sorted({folder[depth] for folder in folders})
    if all(re.fullmatch(r"[0-9]{1,6}", name) for name in classes):
        number = {name: int(name) for name in classes}
        if len(set(number.values())) < len(classes):
            raise UserError(
                f"{files.path}: two folders of classes have the same number, among "
                f"{', '.join(classes[:10])}; expected each number once"
            )
    else:
        number = {name: index for index, name in enumerate(classes)}
    return np.array([number[folder[depth]] for folder in folders], np.int64)


def _labels_from_json(files: PngFolder | PngZip) -> np.ndarray | None:
    where = f"{files.path}: {LABEL_FILE}"
    try:
        listing = json.loads(files.read(LABEL_FILE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable as JSON ({error})") from error
    if not isinstance(listing, dict) or "labels" not in listing:
        raise UserError(f'{where} has no key "labels", expected {{"labels": [[name, label], …]}}')
    if listing["labels"] is None:
        return None
    entries = listing["labels"]
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" is no list, expected [[name, label], …] or null')
    labels = {}
    # A macOS disk may hold "é" as two characters where the JSON has it as one.
    known = {unicodedata.normalize("NFC", name): name for name in files.names}
    for entry in entries:
        if not (isinstance(entry, list) and list(map(type, entry)) == [str, int]):
            raise UserError(f"{where} holds {str(entry)[:80]}, expected [name, whole number]")
        name, label = entry[0].replace("\\", "/"), entry[1]
        if _leaves_root(name):
            raise UserError(f"{where}: the name {name!r} leads out of it")
        name = known.get(unicodedata.normalize("NFC", name))
        if name is None:
            raise UserError(f"{where} names {entry[0]}, which is not there")
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where} gives {name} two labels, {labels[name]} and {label}")
    for name in files.names:
        if name not in labels:
            raise UserError(f"{where} gives no label for {name}, expected one for every image")
    return np.array([labels[name] for name in files.names])
