"""Charts as SVG text in one quiet style that reads on light and dark pages.

Axes and text take the colour of the page's text (``currentColor``), the background is clear, and
text stays text in the page's own font. The same data give the same bytes.

Each function returns one ``<svg>`` element; put it into a page with the macro ``chart`` of
``macros.html``, which adds the caption and the description that a screen reader speaks.
"""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visae.storage.hashing import hash_bytes

__all__ = [
    "ScoreRow",
    "dose_response",
    "effect_against_controls",
    "histogram",
    "score_against_nulls",
]

_INK = "#0a0b0c"  # never seen: becomes currentColor
_ACCENT = "#3a86c8"
_CONTROL = "#8a8f96"
_WIDTH = 6.6
_FEW = 30
_NULL_MARKERS = "|x+1234"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "visae",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


P = ParamSpec("P")

Numbers = Sequence[float | int] | Real[np.ndarray, " number"]
"""What a chart draws: a list, tuple or array of numbers."""


def _in_quiet_style(draw: Callable[P, str]) -> Callable[P, str]:
    """The chart drawn in the style of this module, whatever the user's own settings are."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One metric beside its nulls."""

    name: str
    """What is measured."""
    score: float
    """The score of the SAE."""
    interval: tuple[float, float] | None = None
    """Interval of the score, if known."""
    nulls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The same score under each null or baseline, by its name."""


@_in_quiet_style
def histogram(counts: Numbers, edges: Numbers, *, xlabel: str, ylabel: str) -> str:
    """Bars of counts between edges."""
    figure, axes = _figure(2.0)
    axes.stairs(np.asarray(counts), np.asarray(edges), fill=True, color=_ACCENT, alpha=0.85)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
    return _svg(figure)


@_in_quiet_style
def dose_response(
    doses: Numbers,
    means: Numbers,
    lows: Numbers,
    highs: Numbers,
    *,
    xlabel: str,
    ylabel: str,
    beside: Sequence[float] = (),
) -> str:
    """Mean effect at each dose, with its interval; rules mark no dose and no effect.

    ``beside`` is the mean effect of the controls at each dose, drawn as a dashed line.
    """
    order = np.argsort(doses)
    x, y, low, high = (np.asarray(v, dtype=float)[order] for v in (doses, means, lows, highs))
    figure, axes = _figure(2.9)
    axes.axhline(0, color=_INK, linewidth=0.6, alpha=0.45)
    if x[0] <= 0 <= x[-1]:
        axes.axvline(0, color=_INK, linewidth=0.6, alpha=0.45)
    axes.fill_between(x, low, high, color=_ACCENT, alpha=0.25, linewidth=0)
    if len(beside):
        controls = np.asarray(beside, dtype=float)[order]
        axes.plot(x, controls, color=_CONTROL, linestyle="--", marker="s", markersize=3)
    axes.plot(x, y, color=_ACCENT, marker="o", markersize=4)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _svg(figure)


@_in_quiet_style
def effect_against_controls(
    effect: float,
    interval: tuple[float, float],
    controls: Mapping[str, Numbers],
    *,
    xlabel: str,
) -> str:
    """The edit's effect as a line with its interval as a band, over each family of controls.

    A family of 30 or more draws is a histogram, a smaller one a row of dots.
    """
    n_rows = max(1, len(controls))
    figure, grid = _figures(0.55 + 0.75 * n_rows, n_rows)
    for axes, (name, draws) in zip(grid, controls.items(), strict=False):
        _draw_controls(axes, name, np.asarray(draws, dtype=float))
    for axes in grid:
        axes.axvspan(*interval, color=_ACCENT, alpha=0.22, linewidth=0)
        axes.axvline(effect, color=_ACCENT)
        axes.axvline(0, color=_INK, linewidth=0.6, alpha=0.45)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
    for axes in grid[:-1]:
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
    transform = grid[0].get_xaxis_transform()
    grid[0].text(effect, 1.06, "the edit", transform=transform, ha="center")
    grid[-1].set_xlabel(xlabel)
    return _svg(figure)


@_in_quiet_style
def score_against_nulls(rows: Sequence[ScoreRow]) -> str:
    """A dot for each metric, with its interval, and a mark for the same score under each null."""
    figure, axes = _figure(1.0 + 0.36 * max(1, len(rows)))
    names = list(dict.fromkeys(name for row in rows for name in row.nulls))
    for place, row in enumerate(rows):
        if row.interval is not None:
            axes.plot(row.interval, (place, place), color=_ACCENT, alpha=0.45, linewidth=4)
        axes.plot(row.score, place, "o", color=_ACCENT, label="SAE" if place == 0 else None)
    for number, name in enumerate(names):
        marked = [(row.nulls[name], y) for y, row in enumerate(rows) if name in row.nulls]
        axes.plot(
            [x for x, _ in marked],
            [y for _, y in marked],
            linestyle="none",
            marker=_NULL_MARKERS[number % len(_NULL_MARKERS)],
            markersize=9,
            color=_CONTROL,
            markeredgewidth=1.6,
            label=name,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
    columns = min(3, 1 + len(names))
    figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.3)
    return _svg(figure)


def _draw_controls(axes: Axes, name: str, draws: np.ndarray) -> None:
    if len(draws) >= _FEW:
        counts, edges = np.histogram(draws, bins=min(40, 8 + len(draws) // 10))
        axes.stairs(np.asarray(counts), np.asarray(edges), fill=True, color=_CONTROL, alpha=0.8)
    else:
        axes.plot(draws, np.zeros(len(draws)), "o", color=_CONTROL, alpha=0.7, markersize=4)
        axes.set_ylim(-1, 2)
    label = f"{name}\nn = {len(draws)}"
    axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure, grid = _figures(height, 1)
    return figure, grid[0]


def _figures(height: float, n_rows: int) -> tuple[Figure, list[Axes]]:
    """A figure of some axes below each other that share the horizontal one."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    grid = figure.subplots(n_rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes in grid:
        axes.patch.set_alpha(0.0)
    return figure, list(grid)


def _svg(figure: Figure) -> str:
    """The figure as one element, without date, page size or names that another could share."""
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Type": None, "Format": None}
    figure.savefig(text, format="svg", metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    for part in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"font-family: [^;]*; "):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg stroke-linejoin="round"', 1)
    return _with_own_names(svg.replace(_INK, "currentColor"))


def _with_own_names(svg: str) -> str:
    """Drop ids that nothing refers to, and make the others differ between charts."""
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    own = hash_bytes(svg.encode())[:8]

    def rename(match: re.Match[str]) -> str:
        return f' id="{own}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]*)"', rename, svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{own}-", svg)
