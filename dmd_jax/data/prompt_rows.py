"""Prompts row by row out of .txt, .jsonl, .parquet and WebDataset .tar files.

A row is a line, a JSON object on a line, a row of a table, or a sample of a tar; rows are counted
from 1. A row that gives no prompt is broken and says why: text that is no UTF-8 or holds a NUL
character, damaged JSON, a key that is missing, a value that is no text, an empty line, a carriage
return inside a line, a symbolic link in a tar, or more than MAX_ROW_BYTES. A file in UTF-16 is
refused as a whole.

An empty line is broken, since a stray one looks the same. An empty string in JSON, a table or a
tar is somebody's word and kept: to the pipeline it is the prompt that guidance takes for none.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.files import local_path
from dmd_jax.storage.real_files import check_real_file, is_there
from dmd_jax.storage.safe_pickle import shown

KEYS = ("caption", "text", "prompt")
SUFFIXES = (".txt", ".jsonl", ".parquet", ".tar")
MAX_ROW_BYTES = 1 << 20
# What a column of a row group may unpack to: so many bytes, or so many times those of the file.
_ANY_SIZE, _MOST_COMPRESSION = 128 << 20, 20
_BOM = "\ufeff".encode()
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class BrokenRow(NamedTuple):
    """A row that gives no prompt. where: file and row. problem: what is wrong with it."""

    where: str
    problem: str


class _Problem(Exception):
    pass


class PromptRows:
    """The rows of a source in order, each the UTF-8 bytes of a prompt or a BrokenRow.

    May be iterated again, with the same result as long as the files stay. Nothing is extracted,
    and no more than a row or a batch of a table is held.

    Args:
      source: a file; a folder, whose files of one suffix are taken, hidden ones left out; or a
        pattern such as "data/*.tar". Several files are read in the order of their names.
      key: of JSON objects and the column of tables. None: the first of caption, text and prompt, in
        any case, that is found in the first row (or table) that has one of them, for all others
        too; and in a tar, a sample's .txt before its .json.

    Raises UserError for a source that does not exist, holds no file or several kinds; and, when it
    is iterated, for a file that cannot be read, and a table that has no such column of text.
    """

    def __init__(self, source: str | os.PathLike, *, key: str | None = None):
        try:
            self.files = _find_files(str(source))
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise UserError(
                f"{first_line(error)}; expected a file or folder that can be read"
            ) from error
        self.key = key  # once it is known
        self._asked = key
        self._read = {
            ".txt": self._text_rows,
            ".jsonl": self._json_rows,
            ".parquet": self._table_rows,
            ".tar": self._tar_rows,
        }[self.files[0].suffix.lower()]

    def __iter__(self) -> Iterator[bytes | BrokenRow]:
        for path in self.files:
            try:
                yield from self._read(path)
            except UserError:
                raise
            except Exception as error:  # Arrow, tarfile and zlib each raise their own
                kind = path.suffix.removeprefix(".")
                raise UserError(
                    f"{path}: cannot be read as {kind} ({first_line(error)})"
                ) from error

    def _text_rows(self, path: Path) -> Iterator[bytes | BrokenRow]:
        for number, line in _lines(path):
            try:
                yield _one_line(_not_empty(_utf8(line)))
            except _Problem as problem:
                yield BrokenRow(f"{path} line {number}", str(problem))

    def _json_rows(self, path: Path) -> Iterator[bytes | BrokenRow]:
        for number, line in _lines(path):
            try:
                yield self._from_json(_one_line(_not_empty(_utf8(line))))
            except _Problem as problem:
                yield BrokenRow(f"{path} line {number}", str(problem))

    def _table_rows(self, path: Path) -> Iterator[bytes | BrokenRow]:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"{path}: needs the package pyarrow; install it with pip install 'dmd_jax[text]'"
            ) from error
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if not self._holds_key(schema.names):
                raise UserError(f"{path}: {self._no_key(schema.names)}")
            _check_pages(table.metadata, self.key, path)
            column = schema.field(self.key).type
            if pa.types.is_dictionary(column):
                column = column.value_type
            if column not in (
                *(pa.string(), pa.large_string(), pa.string_view()),
                *(pa.binary(), pa.large_binary(), pa.binary_view()),
            ):
                raise UserError(f"{path}: column {self.key!r} is {column}, expected text")
        # Few long texts may stand for many rows: a column of a dictionary stays one.
        with parquet.ParquetFile(path, read_dictionary=[self.key]) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.key]):
                values = batch.column(0)
                if not pa.types.is_dictionary(values.type):
                    values = values.dictionary_encode()
                # As bytes: Arrow does not check that a string is UTF-8.
                used = values.indices.unique().drop_null()
                found = values.dictionary.take(used).cast(pa.large_binary()).to_pylist()
                texts = dict(zip(used.to_pylist(), found))
                for index in values.indices.to_pylist():
                    number += 1
                    try:
                        yield _utf8(_text(texts.get(index)))
                    except _Problem as problem:
                        yield BrokenRow(f"{path} row {number}", str(problem))

    def _tar_rows(self, path: Path) -> Iterator[bytes | BrokenRow]:
        for sample, members in _tar_samples(path):
            try:
                if "txt" in members and self._asked is None:
                    yield _utf8(_content(members["txt"]))
                elif "json" in members:
                    yield self._from_json(_utf8(_content(members["json"])))
                else:
                    raise _Problem("no .json" if self._asked else "no .txt and no .json")
            except _Problem as problem:
                yield BrokenRow(f"{path} sample {shown(sample)}", str(problem))

    def _from_json(self, text: bytes) -> bytes:
        try:
            row = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise _Problem(f"damaged JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise _Problem("no JSON object")
        if not self._holds_key(row):
            raise _Problem(self._no_key(row))
        return _utf8(_text(row[self.key]))

    def _holds_key(self, names: Iterable[str]) -> bool:
        if self.key is None:
            found = (name for key in KEYS for name in names if name.lower() == key)
            self.key = next(found, None)
        return self.key is not None and self.key in names

    def _no_key(self, names: Iterable[str]) -> str:
        wanted = f"no key {self.key!r}" if self.key else f"no key {', '.join(KEYS)}"
        there = [repr(name)[:40] for name in names]
        named = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
        return f"{wanted}; those there: {named or 'none'}"


def _check_pages(metadata: Any, key: str, path: Path) -> None:
    """Refuses a table whose column would fill the memory as soon as its pages are unpacked."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for column in (rows.column(index) for index in range(rows.num_columns)):
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            if column.path_in_schema == key and size > max(_ANY_SIZE, _MOST_COMPRESSION * stored):
                raise UserError(
                    f"{path}: {key!r} unpacks from {stored:,} bytes to {size:,} in row group "
                    f"{group}; expected at most {_MOST_COMPRESSION} times as many"
                )


def _find_files(source: str) -> list[Path]:
    path = local_path(source)
    if path.is_dir():
        files = _in_folder(path)
    elif path.exists() or not glob.has_magic(source):
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    expected = f"expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not files:
        raise UserError(f"{source}: holds no prompts, {expected}")
    for file in files:
        if not is_there(file):
            raise UserError(f"{source}: no such file or folder, {expected}")
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: unknown kind of file {file.suffix!r}, {expected}")
        check_real_file(file, expected.removeprefix("expected "), may_be_empty=True)
    if len(suffixes := sorted({file.suffix.lower() for file in files})) > 1:
        raise UserError(
            f"{source}: holds {' and '.join(suffixes)}; expected files of one kind, such as "
            f"'{source if path.is_dir() else '.'}/*{suffixes[0]}'"
        )
    return files


def _in_folder(folder: Path) -> list[Path]:
    try:
        files = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        ]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({first_line(error)})") from error
    root = os.path.realpath(folder)
    for path in files:
        if os.path.commonpath((root, os.path.realpath(path))) != root:
            raise UserError(
                f"{folder}: the link {path.name} leads out of the folder; "
                f"expected its files, or '{folder}/*{path.suffix}' to follow links"
            )
    return files


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number and bytes of each line, without its end; of one that is too long, a part."""
    with open(path, "rb") as stream:
        number, limit = 0, MAX_ROW_BYTES + 2
        while line := stream.readline(limit):
            number += 1
            if number == 1 and line.startswith(_UTF16_BOMS):
                raise UserError(
                    f"{path}: is in UTF-16, as Windows PowerShell's > writes it; expected UTF-8"
                )
            rest = line
            while len(rest) == limit and not rest.endswith(b"\n"):
                rest = stream.readline(limit)
            yield number, _without_end(line.removeprefix(_BOM) if number == 1 else line)


def _tar_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """The key of each sample of a WebDataset and its members "txt" and "json".

    A sample is the consecutive members whose names are equal up to the first dot of the last part.
    A hard link is the earlier member that it names. A symbolic link, and a hard link to nothing
    that came before, is None. Folders, devices and hidden files are passed over.
    """
    # Not as a stream: images between the texts are skipped by seeking, which reads none of them.
    with tarfile.open(path, "r:") as tar:
        present, members, end = None, {}, 0
        places: dict[str, tuple[int, int]] = {}  # of the texts: where they begin, and their bytes
        while (member := tar.next()) is not None:
            # A header may claim a negative size, after which the same members would come again.
            if member.size < 0 or tar.offset <= end:
                raise UserError(f"{path}: truncated or damaged, a member of {member.size:,} bytes")
            end = tar.offset
            tar.members = []  # or they would all be held
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            link = member.islnk() or member.issym()
            if not (member.isreg() or link) or not stem or not extension:
                continue
            if (sample := folder + slash + stem) != present:
                if present is not None:
                    yield present, members
                present, members = sample, {}
            if (extension := extension.lower()) in ("txt", "json") and extension not in members:
                if member.isreg():
                    places[member.name] = member.offset_data, member.size
                elif member.islnk() and member.linkname in places:
                    places[member.name] = places[member.linkname]
                members[extension] = None
                if member.name in places and not member.issym():
                    begin, size = places[member.name]
                    tar.fileobj.seek(begin)
                    content = tar.fileobj.read(min(size, MAX_ROW_BYTES + 2))
                    members[extension] = _without_end(content.removeprefix(_BOM))
        if present is not None:
            yield present, members
        # tarfile takes a damaged header for the end; the true one is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise UserError(f"{path}: truncated or damaged, no end where it should be")


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _not_empty(line: bytes) -> bytes:
    if not line.strip():
        raise _Problem("empty line")
    return line


def _one_line(line: bytes) -> bytes:
    if b"\r" in line:
        raise _Problem("a carriage return inside the line; expected \\n or \\r\\n at its end")
    return line


def _content(member: bytes | None) -> bytes:
    if member is None:
        raise _Problem("a link to what is not before it in the tar")
    return member


def _text(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _Problem(f"no text but {'null' if value is None else type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise _Problem(f"no valid Unicode: {error.reason}") from error


def _utf8(content: bytes) -> bytes:
    if len(content) > MAX_ROW_BYTES:
        raise _Problem(f"more than {MAX_ROW_BYTES:,} bytes")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise _Problem(f"no UTF-8: {error.reason} at byte {error.start}") from error
    if b"\0" in content:
        raise _Problem("a NUL character (text in UTF-16?)")
    return content
