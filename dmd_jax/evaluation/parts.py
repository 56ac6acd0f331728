"""Work that is kept in parts, so that a run that is stopped loses no more than one."""

from __future__ import annotations

import contextlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmd_jax.errors import UserError, differing, first_line
from dmd_jax.storage.files import replacing, write_json
from dmd_jax.storage.real_files import is_there
from dmd_jax.storage.untrusted import read_json

log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"


class Rows:
    """Rows 0..count-1 of some arrays, in the files FOLDER/NAME-00000.npz and so on.

    A part appears whole or not at all; one that does not hold its rows is reported through
    logging and made again. Part i is made by process i % processes, and all share the folder.
    """

    def __init__(self, folder: Path, name: str, count: int, part_size: int):
        self.folder, self.name, self.count, self.part_size = folder, name, count, part_size
        self.numbers = range(-(-count // part_size))

    def make(
        self,
        make_part: Callable[[int, int], dict[str, np.ndarray]],
        started: Callable[[int, int], None],
    ) -> None:
        """Makes this process's parts that are missing.

        Args:
          make_part: (start, stop) -> arrays whose first axis is these rows.
          started: called once before the first, with this process's rows that are there and its
            rows in all.

        Raises:
          UserError: a part cannot be written; what is finished is kept.
        """
        own = self.numbers[jax.process_index() :: jax.process_count()]
        missing = [number for number in own if self._load(number) is None]
        total = sum(self._size(number) for number in own)
        started(total - sum(self._size(number) for number in missing), total)
        for number in missing:
            start = number * self.part_size
            arrays = make_part(start, start + self._size(number))
            try:
                with replacing(self._path(number)) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)
            except OSError as error:
                raise UserError(
                    f"{self._path(number)} cannot be written: {first_line(error)}; finished parts "
                    "are kept: run the same command when that is put right"
                ) from error

    def read(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """The arrays of these names, part by part in order.

        Raises:
          UserError: a part is missing or damaged.
        """
        for number in self.numbers:
            arrays = self._load(number, names)
            if arrays is None:
                raise UserError(
                    f"{self._path(number)} is missing or damaged; expected all processes to share "
                    "that folder: run the same command again"
                )
            yield tuple(arrays[name] for name in names)

    def write_npz(self, path: Path, names: Sequence[str]) -> None:
        """Writes arrays part by part to an .npz, as 50,000 images need not fit in memory.

        Raises:
          UserError: as `read`. OSError: the file cannot be written.
        """
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name in names:
                self._stream(archive, name)

    def remove(self) -> None:
        """Deletes the parts."""
        for number in self.numbers:
            self._path(number).unlink(missing_ok=True)

    def _stream(self, archive: zipfile.ZipFile, name: str) -> None:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            for number, (part,) in enumerate(self.read(name)):
                if number == 0:
                    shape = (self.count, *part.shape[1:])
                    descr = np.lib.format.dtype_to_descr(part.dtype)
                    header = {"shape": shape, "fortran_order": False, "descr": descr}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(part).tobytes())

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05d}.npz"

    def _size(self, number: int) -> int:
        return min(self.part_size, self.count - number * self.part_size)

    def _load(self, number: int, names: Sequence[str] = ()) -> dict[str, np.ndarray] | None:
        """The arrays of these names, or all; None for a part that has to be made."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in names or file.files}
            if any(len(array) != self._size(number) for array in arrays.values()):
                raise ValueError(f"not of {self._size(number)} rows")
        except Exception as error:  # NumPy, zipfile and zlib each raise their own
            log.warning("%s is damaged (%s); making it again", path, first_line(error))
            return None
        return arrays


def claim(
    folder: Path, settings: dict[str, Any], *, others: str = "parts of another evaluation"
) -> None:
    """Makes a folder for parts that depend on `settings`, or goes on with it.

    Every process calls it; it returns once all have, and raises in all if it does in one.

    Args:
      others: what a folder of other settings is said to hold.

    Raises:
      UserError: the folder holds parts of other settings (named), or something else, or cannot
        be written; or another process was refused.
    """
    path = folder / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))

    def make() -> None:
        if jax.process_index() > 0 or is_there(path):
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds no {SETTINGS_FILE}; expected another --out")
        write_json(path, settings)

    def check() -> None:
        found = read_json(path, "the settings of an evaluation's parts")
        _check_settings(found, settings, folder, others)

    _together(path, make)
    _together(path, check)


def release(folder: Path, *kinds: Rows) -> None:
    """Deletes the parts and, if nothing else is in it, the folder."""
    # What cannot be deleted is only in the way of nothing.
    with contextlib.suppress(OSError):
        for rows in kinds:
            rows.remove()
        (folder / SETTINGS_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _together(path: Path, action: Callable[[], None]) -> None:
    """Acts in every process; all raise if one does, as the others would wait for it."""
    refused = None
    try:
        action()
    except UserError as error:
        refused = error
    except (OSError, ValueError) as error:
        refused = UserError(f"{path} cannot be used: {first_line(error)}")
    everywhere = multihost_utils.process_allgather(np.int32(refused is not None))
    if refused is not None:
        raise refused
    if everywhere.any():
        raise UserError(
            f"process {everywhere.argmax()} was refused {path.parent}; its message says why"
        )


def _check_settings(found: Any, settings: dict[str, Any], folder: Path, others: str) -> None:
    found = found if isinstance(found, dict) else {}
    if different := differing(found, settings, "{} {!r} there, {!r} asked for"):
        raise UserError(
            f"{folder} holds {others} ({different}); expected the same settings, "
            "another --out, or that folder deleted"
        )
