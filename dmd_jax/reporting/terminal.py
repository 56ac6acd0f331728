"""What commands print: without control characters of others, on any encoding, or a UserError."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from dmd_jax.errors import UserError
from dmd_jax.progress import ERASE_LINE

# Control characters but tab and newline; what turns the direction of text or does not show; line
# ends of Unicode; halves of surrogate pairs, as names that are no UTF-8 have them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def escaped(text: str) -> str:
    r"""The text with control characters, tab and newline aside, as \x1b, \u202e and so on."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""As `escaped`, with newlines inside as \n and tabs as \t."""
    return escaped(text.strip()).replace("\n", r"\n").replace("\t", r"\t")


class _Stream:
    """A text stream that shows control characters as escapes."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._writing():
            self._stream.write(text if text is ERASE_LINE else escaped(text))
        return len(text)

    def flush(self) -> None:
        with self._writing():
            self._stream.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _give_up(self._stream)
            raise UserError(
                f"{self._name} cannot be written ({error.strerror}); expected a terminal, a pipe "
                "with a reader, or a file with room"
            ) from error


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Standard output and error as this module writes them.

    Raises:
      UserError: one of them is closed: the next file that is opened would take its place.
    """
    before = sys.stdout, sys.stderr
    for stream, name in zip(before, ("standard output", "standard error")):
        if stream is None:
            raise UserError(f"{name} is closed; expected it open, such as on /dev/null")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal in Latin-1 has no …
    sys.stdout, sys.stderr = (
        _Stream(before[0], "standard output"),
        _Stream(before[1], "standard error"),
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _give_up(stream: TextIO) -> None:
    """Sends what is left in the stream to nowhere, or Python complains of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
