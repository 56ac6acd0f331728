"""The bytes of an image file as pixels: 8-bit, grey or RGB, upright, one picture a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dmd_jax.errors import UserError, first_line
from dmd_jax.storage.real_files import stand_in

# What Pillow reads by decoders of its own or by libjpeg, libwebp and libtiff, without a program
# beside it.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff")
)
MAX_PIXELS = 4096 * 4096
_BITS_PER_SAMPLE = 258  # the tag of TIFF

# Larger pictures are refused below; Pillow's own warning has a limit above ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_pixels(data: bytes, where: str, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """uint8 [H, W, 1] of a grey image, [H, W, 3] of a colour one, turned as its EXIF says.

    Of stereo and depth photographs in a JPEG (MPO) the first picture counts, as for other readers.

    Args:
      data: the content of the file; its first bytes decide what it is, not its name.
      where: names the file in errors.
      formats: those of FORMATS that it may be of.

    Raises:
      UserError: not readable, more than MAX_PIXELS, several pictures, 16 bits, or neither grey nor
        RGB, such as CMYK or with transparency.
    """
    kinds = ", ".join(formats)
    if problem := stand_in(data[:1024]):
        raise UserError(f"{where}: {problem}; expected {kinds}")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_header(image, where)
            image = ImageOps.exif_transpose(image)
            # One bit per pixel and palettes are only ways to store grey and RGB.
            mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
            pixels = np.asarray(image if mode == image.mode else image.convert(mode))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{where}: cannot be read as {kinds} (it does not begin like one)"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise UserError(f"{where}: cannot be read as {kinds} ({first_line(error)})") from error
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def _check_header(image: Image.Image, where: str) -> None:
    """Refuses, before a pixel is decoded, what would be read wrongly or in part."""
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{where}: {image.width:,} x {image.height:,} pixels, expected at most {MAX_PIXELS:,}"
        )
    if image.format != "MPO" and _has_more(image):
        raise UserError(
            f"{where}: a {image.format} of several pictures (an animation, or pages), expected one"
        )
    bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    if bits > 8:
        raise UserError(f"{where}: {bits} bits a sample, expected 8-bit grey or RGB")
    if image.mode not in ("1", "L", "P", "RGB"):
        raise UserError(
            f"{where}: a {image.format} of mode {image.mode}, expected 8-bit grey or RGB without "
            "alpha"
        )
    alpha = image.info.pop("transparency", b"")  # or Pillow warns of it
    if not isinstance(alpha, bytes) or not set(alpha) <= {255}:
        raise UserError(
            f"{where}: a {image.format} with transparent colours, expected grey or RGB without "
            "alpha"
        )


def _has_more(image: Image.Image) -> bool:
    """Whether another picture follows the first; a TIFF's are not counted, which may take long."""
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1) > 1
    try:
        image.seek(1)
    except EOFError:
        return False
    return True
