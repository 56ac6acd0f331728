"""What PNG needs beside other formats: its large texts are left out, its 16 bits are noticed."""

from __future__ import annotations

import numpy as np

from dmd_jax.data.pixels import decode_pixels
from dmd_jax.errors import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH = 24  # the place of this byte in a file


def decode_png(data: bytes, where: str) -> np.ndarray:
    """The pixels of a PNG, as `decode_pixels` gives them.

    Raises:
      UserError: as `decode_pixels`; among it 16 bits, of which Pillow would drop eight.
    """
    if data[_BIT_DEPTH : _BIT_DEPTH + 1] == b"\x10" and data.startswith(SIGNATURE):
        raise UserError(f"{where}: a PNG of 16 bits a sample, expected 8-bit grey or RGB")
    return decode_pixels(_without_texts(data), where, ["PNG"])


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks of text and colour profile, which change no pixel here.

    Pillow unpacks them at once and refuses an image whose text is large. What is no sequence of
    chunks comes back as it is.
    """
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        if end > len(data):
            return data
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept) if place == len(data) else data
