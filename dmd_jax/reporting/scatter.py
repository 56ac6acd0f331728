"""Point clouds in the plane as one picture, for the toy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT, FRAME, GROUND = (38, 42, 51), (112, 118, 130), (205, 209, 217), (250, 250, 252)
REAL, FAKE = (74, 122, 181), (222, 84, 36)
COLUMNS = 2
# In pixels of the finished picture.
PANEL_WIDTH, MARGIN, TITLE_HEIGHT, LEGEND_HEIGHT, DOT_RADIUS = 460, 24, 80, 40, 2.2
# ImageDraw draws hard edges: everything is drawn this much larger and shrunk.
SUPERSAMPLING = 3
POINTS_SHOWN = 1000


class Panel(NamedTuple):
    """One cloud of fakes and what is written over it."""

    title: str
    note: str
    points: np.ndarray  # [N, 2]


def draw_panels(
    panels: Sequence[Panel], *, real: np.ndarray, centers: np.ndarray, radius: float
) -> np.ndarray:
    """The panels on equal axes, each over the same real points, with circles about the centres.

    Args:
      real: [M, 2]. Of it and of each panel's points the first POINTS_SHOWN are drawn.
      centers: [K, 2]. radius: of the circles, in the points' unit.

    Returns:
      uint8 [height, width, 3].
    """
    clouds = [real, *(panel.points for panel in panels)]
    shown = np.concatenate([cloud[:POINTS_SHOWN] for cloud in clouds])
    low, high = shown.min(axis=0), shown.max(axis=0)
    low, high = low - 0.03 * (high - low).max(), high + 0.03 * (high - low).max()
    scale = PANEL_WIDTH / (high[0] - low[0])
    panel_height = round(scale * (high[1] - low[1]))
    rows = -(-len(panels) // COLUMNS)
    size = (
        MARGIN + COLUMNS * (PANEL_WIDTH + MARGIN),
        MARGIN + rows * (TITLE_HEIGHT + panel_height) + LEGEND_HEIGHT,
    )
    canvas = _Canvas(size)
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        left = MARGIN + column * (PANEL_WIDTH + MARGIN)
        top = MARGIN + row * (TITLE_HEIGHT + panel_height)
        canvas.text(left, top, panel.title, 22, INK)
        canvas.text(left, top + 31, panel.note, 15, FAINT)
        top += TITLE_HEIGHT - MARGIN
        canvas.rectangle(left, top, PANEL_WIDTH, panel_height)

        def place(point: np.ndarray, left=left, top=top) -> tuple[float, float]:
            return left + scale * (point[0] - low[0]), top + scale * (high[1] - point[1])

        for color, cloud in ((REAL, real), (FAKE, panel.points)):
            for point in cloud[:POINTS_SHOWN]:
                canvas.circle(*place(point), DOT_RADIUS, fill=(*color, 120))
        for center in centers:
            canvas.circle(*place(center), scale * radius, outline=(*INK, 150))
    middle = size[1] - LEGEND_HEIGHT / 2
    for left, color, label in ((MARGIN, REAL, "real samples"), (MARGIN + 150, FAKE, "fakes")):
        canvas.circle(left + 6, middle, 6, fill=color)
        canvas.text(left + 20, middle - 11, label, 17, INK)
    return canvas.picture()


class _Canvas:
    """ImageDraw in finished pixels, with transparent colours and smooth edges."""

    def __init__(self, size: tuple[int, int]):
        self._size = size
        self._image = Image.new("RGB", tuple(SUPERSAMPLING * length for length in size), "white")
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def text(self, x: float, y: float, content: str, height: int, color) -> None:
        font = ImageFont.load_default(SUPERSAMPLING * height)
        self._draw.text((SUPERSAMPLING * x, SUPERSAMPLING * y), content, fill=color, font=font)

    def rectangle(self, left: float, top: float, width: float, height: float) -> None:
        box = SUPERSAMPLING * np.array([left, top, left + width, top + height])
        self._draw.rectangle(tuple(box), fill=GROUND, outline=FRAME, width=SUPERSAMPLING)

    def circle(self, x: float, y: float, radius: float, *, fill=None, outline=None) -> None:
        box = SUPERSAMPLING * np.array([x - radius, y - radius, x + radius, y + radius])
        self._draw.ellipse(tuple(box), fill=fill, outline=outline, width=SUPERSAMPLING)

    def picture(self) -> np.ndarray:
        return np.asarray(self._image.resize(self._size, Image.Resampling.LANCZOS))
