"""Pictures of features: heat maps over images, a feature's contact sheet, an overview of several.

Every example is shown twice: the image as the model saw it, and below it in grey with the
patches coloured at which the feature fires. Colours run from 0 to the feature's maximum over the
indexed images, in every picture of one sheet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from visae.features.index import FeatureIndex
from visae.features.record import BANDS, Band, Example
from visae.features.table import FeatureRow
from visae.reports.colours import heat_colours, hex_colours
from visae.reports.drawing import (
    INK,
    LINE,
    MUTED,
    PAPER,
    draw_histogram,
    draw_text,
    fit_text,
    text_width,
)
from visae.reports.wording import BAND_TITLES, count, feature_facts, number, plural, preferred_class

__all__ = ["feature_sheet", "heat_overlay", "log_heights", "overview_sheet"]

_DIM = 0.7
_GAP = 10
_MARGIN = 24
_BAND_WIDTH = 140
_CAPTION = 20
_LEGEND = 300
_FACTS = 86
_LINE = 42


class _Fact(NamedTuple):
    """One statistic, and how far from the margin it stands."""

    x: float
    title: str
    value: str


class _Tile(NamedTuple):
    """Size of one picture of a sheet, in pixels."""

    width: int
    height: int


def heat_overlay(
    view: Image.Image,
    grid: Float[np.ndarray, "row column"],
    *,
    peak: float,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """A view in grey with every patch coloured at which the feature fires.

    Pixel y of a picture of height h shows row ⌊(y + ½)·rows/h⌋ of the grid, and likewise for
    columns, so each patch lights exactly the pixels it covers.

    Args:
        view: What the model saw, as RGB.
        grid: Activation at every patch.
        peak: Activation of the strongest colour.
        size: Width and height of the picture, those of the view unless given.
    """
    width, height = size or view.size
    grey = view.resize((width, height), Image.Resampling.LANCZOS).convert("L")
    base = np.asarray(grey, dtype=np.float64)[..., None] * _DIM
    colours = heat_colours(grid, peak=peak).astype(np.float64)
    rows, columns = _covering(height, grid.shape[0]), _covering(width, grid.shape[1])
    lit = colours[rows][:, columns]
    opacity = lit[..., 3:] / 255
    mixed = base * (1 - opacity) + lit[..., :3] * opacity
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def feature_sheet(index: FeatureIndex, feature: int, *, tile: int = 128) -> Image.Image:
    """A feature's contact sheet: statistics, histogram, and the examples of every band.

    ``tile`` is the width of a picture in pixels.

    Raises:
        FeatureIndexError: when there is no such feature, or the index is damaged.
    """
    row, examples = index.row(feature), index.examples(feature)
    size = _tile(index, tile)
    bands = [band for band in BANDS if examples[band]]
    columns = index.record.config.examples_per_band
    width = 2 * _MARGIN + _BAND_WIDTH + columns * (size.width + _GAP)
    right = width - _MARGIN - _GAP
    facts = _lines_of_facts(row, index.n_images, right - _LEGEND - 30 - _MARGIN)
    head = _FACTS + len(facts) * _LINE + 22
    band_height = 2 * size.height + 2 + _CAPTION + 14
    sheet = Image.new("RGB", (width, head + max(1, len(bands)) * band_height + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, index, row, facts)
    _draw_legend(draw, row, right)
    draw.line((_MARGIN, head - 16, right, head - 16), fill=LINE)
    for number_of_band, band in enumerate(bands):
        top = head + number_of_band * band_height
        _draw_band_label(draw, band, examples[band], top)
        _paste_pairs(sheet, index, row, examples[band], (_MARGIN + _BAND_WIDTH, top), size)
    if not bands:
        text = "This feature fires on none of the indexed images."
        draw_text(draw, (_MARGIN, head), text, size=15, fill=MUTED)
    return sheet


def overview_sheet(
    index: FeatureIndex,
    features: Sequence[int],
    *,
    n_images: int = 5,
    tile: int = 112,
    n_columns: int = 2,
) -> Image.Image:
    """Several features side by side, each with the images on which it fires most.

    Raises:
        FeatureIndexError: when there is no such feature, or the index is damaged.
    """
    size = _tile(index, tile)
    block = n_images * (size.width + _GAP) - _GAP, 48 + 2 * size.height + 2 + _CAPTION + 12
    n_rows = -(-len(features) // n_columns)
    width = 2 * _MARGIN + n_columns * block[0] + (n_columns - 1) * 2 * _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + n_rows * block[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, feature in enumerate(features):
        left = _MARGIN + place % n_columns * (block[0] + 2 * _MARGIN)
        top = _MARGIN + place // n_columns * block[1]
        row = index.row(feature)
        draw_text(draw, (left, top), index.name(feature), size=17, face="mono")
        fires = f"fires on {count(row.n_images_active)} of {plural(index.n_images, 'image')}"
        said = fit_text(f"{fires}; {preferred_class(row)}", block[0], size=13)
        draw_text(draw, (left, top + 23), said, size=13, fill=MUTED)
        examples = index.examples(feature)["top"][:n_images]
        _paste_pairs(sheet, index, row, examples, (left, top + 48), size)
    return sheet


def log_heights(counts: Sequence[int]) -> list[float]:
    """Heights of histogram bars, from 0 to 1, on the scale log(1 + count)."""
    logs = np.log1p(np.asarray(counts, dtype=np.float64))
    return [float(height) for height in logs / max(float(logs.max(initial=0.0)), 1e-9)]


def _covering(n_pixels: int, n_patches: int) -> Int[np.ndarray, " pixel"]:
    """The patch that each pixel of one axis shows: the one that covers its centre."""
    return ((np.arange(n_pixels) + 0.5) * n_patches / n_pixels).astype(np.int64)


def _tile(index: FeatureIndex, width: int) -> _Tile:
    view_height, view_width = index.record.preprocessing.size
    return _Tile(width, max(1, round(width * view_height / view_width)))


def _lines_of_facts(row: FeatureRow, n_images: int, room: float) -> list[list[_Fact]]:
    """The statistics as places on lines that are at most ``room`` wide."""
    lines: list[list[_Fact]] = [[]]
    x = 0.0
    for title, value in feature_facts(row, n_images):
        width = max(text_width(title, size=12), text_width(value, size=15, face="mono"))
        if lines[-1] and x + width > room:
            lines.append([])
            x = 0.0
        lines[-1].append(_Fact(x, title, value))
        x += width + 26
    return lines


def _draw_head(
    draw: ImageDraw.ImageDraw, index: FeatureIndex, row: FeatureRow, lines: list[list[_Fact]]
) -> None:
    """Name, model and statistics."""
    record = index.record
    draw_text(draw, (_MARGIN, 20), index.name(row.feature), size=26, face="mono")
    where = f"{record.model.title}, {record.site}"
    draw_text(draw, (_MARGIN, 54), where, size=13, fill=MUTED)
    for number_of_line, line in enumerate(lines):
        y = _FACTS + _LINE * number_of_line
        for fact in line:
            draw_text(draw, (_MARGIN + fact.x, y), fact.title, size=12, fill=MUTED)
            draw_text(draw, (_MARGIN + fact.x, y + 17), fact.value, size=15, face="mono")


def _draw_legend(draw: ImageDraw.ImageDraw, row: FeatureRow, right: int) -> None:
    """The histogram of activations, in the colours of the heat maps."""
    left = right - _LEGEND
    heights = log_heights(row.histogram)
    draw_histogram(draw, (left, 24, right, 96), heights, hex_colours(len(heights)))
    draw_text(draw, (left, 101), "0", size=12, face="mono", fill=MUTED)
    draw_text(draw, (right, 101), number(row.max), size=12, face="mono", fill=MUTED, anchor="ra")
    title = "activation (bars: tokens, log scale)"
    draw_text(draw, ((left + right) / 2, 101), title, size=12, fill=MUTED, anchor="ma")


def _draw_band_label(
    draw: ImageDraw.ImageDraw, band: Band, examples: Sequence[Example], top: int
) -> None:
    title, lines = BAND_TITLES[band]
    draw_text(draw, (_MARGIN, top + 2), title, size=15, face="sans-bold")
    for number_of_line, line in enumerate(lines):
        draw_text(draw, (_MARGIN, top + 24 + 17 * number_of_line), line, size=12, fill=MUTED)
    span = f"max {number(examples[-1].max)} to {number(examples[0].max)}"
    below = top + 28 + 17 * len(lines)
    draw_text(draw, (_MARGIN, below), span, size=12, face="mono", fill=INK)


def _paste_pairs(
    sheet: Image.Image,
    index: FeatureIndex,
    row: FeatureRow,
    examples: Sequence[Example],
    corner: tuple[int, int],
    size: _Tile,
) -> None:
    """Each example as its image, the heat map below, and a caption."""
    draw = ImageDraw.Draw(sheet)
    grids = index.heat_maps(row.feature, [example.image_row for example in examples]).numpy()
    for column, (example, grid) in enumerate(zip(examples, grids, strict=True)):
        left, top = corner[0] + column * (size.width + _GAP), corner[1]
        view = index.thumbnail(example.content_id)
        sheet.paste(view.resize(size, Image.Resampling.LANCZOS), (left, top))
        heat = heat_overlay(view, grid, peak=row.max, size=size)
        sheet.paste(heat, (left, top + size.height + 2))
        below = top + 2 * size.height + 6
        draw_text(draw, (left, below), number(example.max), size=12, face="mono")
        room = size.width - text_width(number(example.max), size=12, face="mono") - 8
        label = fit_text(index.images.labels[example.image_row] or "", room, size=12)
        draw_text(draw, (left + size.width, below), label, size=12, fill=MUTED, anchor="ra")
