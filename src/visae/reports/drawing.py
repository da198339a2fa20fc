"""Text and bars on Pillow images, in the fonts that matplotlib carries, so equal everywhere."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from PIL import ImageDraw, ImageFont

__all__ = [
    "INK",
    "LINE",
    "MUTED",
    "PAPER",
    "draw_histogram",
    "draw_text",
    "fit_text",
    "text_width",
]

PAPER = "#ffffff"
"""Background."""
INK = "#1b1d20"
"""Text."""
MUTED = "#5b626a"
"""Secondary text."""
LINE = "#c9cdd2"
"""Rules and axes."""

Face = Literal["sans", "sans-bold", "mono"]

_FILES: dict[Face, str] = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "mono": "DejaVuSansMono.ttf",
}


def draw_text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    *,
    size: int,
    face: Face = "sans",
    fill: str = INK,
    anchor: str = "la",
) -> None:
    """Draw a line of text; ``anchor`` is Pillow's, ``la`` for the left end of the ascender."""
    draw.text(place, text, fill=fill, font=_font(face, size), anchor=anchor)


def text_width(text: str, *, size: int, face: Face = "sans") -> float:
    """Width of a line of text in pixels."""
    return float(_font(face, size).getlength(text))


def fit_text(text: str, room: float, *, size: int, face: Face = "sans") -> str:
    """The text, cut with an ellipsis where it is wider than ``room`` pixels; perhaps nothing."""
    if text_width(text, size=size, face=face) <= room:
        return text
    for length in range(len(text) - 1, 0, -1):
        cut = text[:length].rstrip() + "…"
        if text_width(cut, size=size, face=face) <= room:
            return cut
    return ""


def draw_histogram(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    heights: Sequence[float],
    colours: Sequence[str],
) -> None:
    """Draw bars of heights 0 to 1 side by side into a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    step = (right - left) / len(heights)
    for number, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        if height > 0:
            x0, x1 = round(left + number * step), round(left + (number + 1) * step) - 1
            y0 = min(bottom - 1, round(bottom - height * (bottom - top)))
            draw.rectangle((x0, y0, max(x0, x1), bottom - 1), fill=colour)
    draw.line((left, bottom, right, bottom), fill=LINE)


@functools.cache
def _font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / _FILES[face]
    return ImageFont.truetype(str(path), size)
