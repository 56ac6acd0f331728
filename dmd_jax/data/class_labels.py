"""The classes of image files: of EDM's dataset.json, or of the folders that they lie in."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from dmd_jax.data.image_files import LABEL_FILE, ImageFolder, ImageZip, leaves_root
from dmd_jax.errors import UserError
from dmd_jax.storage.untrusted import LONGEST_JSON, parse_json


class Labels(NamedTuple):
    """An integer for each image, and the names of the classes where folders give them."""

    values: np.ndarray  # [N]
    names: tuple[str | None, ...] | None  # by label; None for a number that no folder has


def read_labels(files: ImageFolder | ImageZip) -> Labels | None:
    """The labels of `files.names`, or None if the images have none.

    From EDM's dataset.json ({"labels": [["dir/img.png", 6], …]}, or null for none) if it is
    there. Otherwise the folder that an image lies in, below what all images have in common,
    names its class, and the classes are numbered in sorted order. Where every name is a whole
    number of at most six digits, these numbers are the labels.

    Raises:
      UserError: a dataset.json that is damaged or does not fit the images, or images beside the
        folders of classes.
    """
    if files.has_label_file:
        values = _labels_from_json(files)
        return None if values is None else Labels(values, None)
    return _labels_from_folders(files)


def _labels_from_folders(files: ImageFolder | ImageZip) -> Labels | None:
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
    values = np.array([number[folder[depth]] for folder in folders], np.int64)
    named = {index: name for name, index in number.items()}
    return Labels(values, tuple(named.get(index) for index in range(max(named) + 1)))


def _labels_from_json(files: ImageFolder | ImageZip) -> np.ndarray | None:
    where = f"{files.path}: {LABEL_FILE}"
    expected = '{"labels": [[name, label], …]}'
    listing = parse_json(files.read(LABEL_FILE, LONGEST_JSON), where, expected)
    if not isinstance(listing, dict) or "labels" not in listing:
        raise UserError(f'{where} has no key "labels", expected {expected}')
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
        if leaves_root(name):
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
