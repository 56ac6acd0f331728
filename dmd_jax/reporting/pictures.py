"""Images to bytes, to one grid, to a PNG file."""

from __future__ import annotations

import io
import math
import os

import numpy as np
from PIL import Image

from dmd_jax.errors import UserError
from dmd_jax.storage.files import write_whole

# How images in [-1, 1] become bytes, before these are clipped to 0..255 and truncated: EDM's rule
# (arXiv 2206.00364, as released) rounds to the nearest byte, DMD2's (2405.14867, as released) down.
BYTE_RULES = {
    "edm": lambda images: images * 127.5 + 128,
    "dmd2": lambda images: (images + 1) * 127.5,
}
GUTTER = 2  # pixels between the images of a grid, whatever their scale
GUTTER_GREY = 64


def to_uint8(images: np.ndarray, rule: str = "edm") -> np.ndarray:
    """Bytes of images in [-1, 1], by a rule that FID figures depend on.

    x * 127.5 + 128, clipped to 0..255, truncated, is EDM's. Under DMD2's, floats that were made of
    bytes may come back one lower: such images take EDM's. Floating point in, uint8 of the same
    shape out.

    Args:
      rule: one of BYTE_RULES.

    Raises:
      UserError: the images are not floating point, or hold NaN.
    """
    images = np.asarray(images)
    if images.dtype.kind in "biu":
        raise UserError(f"images: {images.dtype}, expected floating point in [-1, 1]")
    if images.dtype != np.float64:
        images = images.astype(np.float32)
    holes = np.count_nonzero(np.isnan(images))
    if holes:
        raise UserError(f"images: {holes} of {images.size} values are NaN, expected [-1, 1]")
    return np.clip(BYTE_RULES[rule](images), 0, 255).astype(np.uint8)


def signed(images: np.ndarray) -> np.ndarray:
    """A signed field such as a gradient as a picture: zero is mid-grey.

    All values share one scale, the 99th percentile of the absolute value, so that images compare
    and an outlier does not turn the rest grey. Floating point of any shape in, uint8 out.

    Raises:
      UserError: as `to_uint8`.
    """
    images = np.asarray(images).astype(np.float32)
    magnitude = np.abs(images)
    # More than 99% exact zeros leave the percentile at zero.
    scale = np.percentile(magnitude, 99) or magnitude.max()
    return to_uint8(images / scale if scale else images)


def viewing_scale(height: int) -> int:
    """The whole number that brings images of this height to about 32 pixels, at least 1."""
    return max(1, 32 // height)


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """All images on one sheet, row by row, with a thin grey gutter around each.

    Args:
      images: [N, H, W, C], C 1 or 3; uint8 as it is, floating point in [-1, 1] by `to_uint8`.
      columns: images in a row; by default about as many as there are rows.
      scale: each pixel becomes scale x scale pixels (nearest neighbour), to see tiny images.

    Returns:
      uint8 [height, width, C]. Cells that no image is left for stay grey.

    Raises:
      UserError: another number of axes or channels, no image, or what `to_uint8` refuses.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise UserError(f"images: shape {images.shape}, a grid takes (N, H, W, 1 or 3), N >= 1")
    if images.dtype != np.uint8:
        images = to_uint8(images)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    cell_height, cell_width = height + GUTTER, width + GUTTER
    sheet = np.full(
        (rows * cell_height + GUTTER, columns * cell_width + GUTTER, channels),
        GUTTER_GREY,
        np.uint8,
    )
    for index, image in enumerate(images):
        top = GUTTER + index // columns * cell_height
        left = GUTTER + index % columns * cell_width
        sheet[top : top + height, left : left + width] = image
    return sheet


def png_bytes(picture: np.ndarray) -> bytes:
    """A PNG file's bytes from uint8 [H, W], [H, W, 1] (grey) or [H, W, 3] (RGB)."""
    picture = np.asarray(picture)
    if picture.ndim == 3 and picture.shape[-1] == 1:
        picture = picture[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes a picture (as `png_bytes` takes it) whole or not at all; its folder is made."""
    write_whole(path, png_bytes(picture))
