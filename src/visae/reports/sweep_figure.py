"""The figure of a sweep: NMSE against L0 of every SAE, with the front that none beats.

A panel for every site. Colour and marker say the kind, the line is the front, and a ring marks
the SAE that the rule chose.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visae.errors import ConfigError
from visae.reports.drawing import INK, LINE, MUTED, PAPER
from visae.storage.atomic import atomic_path
from visae.training.sweep_results import SweepResult, SweepRow

__all__ = ["sweep_figure", "write_sweep_figure"]

_KINDS = {  # colours that colour-blind readers tell apart (Okabe and Ito)
    "batch-topk": ("#0072b2", "o"),
    "topk": ("#d55e00", "s"),
    "jumprelu": ("#009e73", "^"),
    "relu": ("#cc79a7", "D"),
    "gated": ("#e69f00", "v"),
}
_OTHER = ("#56b4e9", "P")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "visae",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def sweep_figure(result: SweepResult) -> Figure:
    """NMSE against L0 of a sweep's SAEs, a panel for every site; controls have no place in it.

    Raises:
        ConfigError: when the sweep has controls alone.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        return _drawn(result)


def write_sweep_figure(result: SweepResult, folder: Path) -> tuple[Path, Path]:
    """Write ``pareto.png`` and ``pareto.svg`` into a folder; gives their paths.

    Raises:
        ConfigError: when the sweep has controls alone.
    """
    figure = sweep_figure(result)
    paths = folder / "pareto.png", folder / "pareto.svg"
    with mpl.rc_context(_STYLE):
        for path, metadata in zip(paths, ({}, {"Date": None}), strict=True):
            with atomic_path(path) as temporary:
                kind = path.suffix.removeprefix(".")
                figure.savefig(temporary, format=kind, dpi=200, metadata=metadata)
    return paths


def _drawn(result: SweepResult) -> Figure:
    shown = [row for row in result.rows if row.candidate is not None]
    if not shown:
        raise ConfigError(
            "There is nothing to draw: every SAE of the sweep is a control",
            fix="Add SAEs that are no controls",
        )
    sites = list(dict.fromkeys(row.sites for row in shown))
    figure = Figure(figsize=(6.6, 0.9 + 2.9 * len(sites)), layout="constrained")
    for axes, name in zip(figure.subplots(len(sites), 1, squeeze=False)[:, 0], sites, strict=True):
        _draw_panel(axes, [row for row in shown if row.sites == name])
        axes.set_title(name, loc="left", fontsize=10.5)
    figure.supxlabel(f"Ringed: {result.rule_text}.", fontsize=8, color=MUTED)
    return figure


def _draw_panel(axes: Axes, rows: list[SweepRow]) -> None:
    unbeaten = sorted((row for row in rows if row.on_front), key=_place)
    axes.plot(*_columns(unbeaten), color=MUTED, linewidth=1.0, zorder=1)
    for kind in dict.fromkeys(row.kind for row in rows):
        colour, marker = _KINDS.get(kind, _OTHER)
        axes.plot(
            *_columns([row for row in rows if row.kind == kind]),
            linestyle="none",
            marker=marker,
            color=colour,
            alpha=0.85,
            label=kind,
            zorder=2,
        )
    for row in rows:
        if row.chosen:
            _ring(axes, row)
    axes.set(xlabel="L0 (active features per token)", ylabel="NMSE")
    axes.margins(0.12)
    axes.set_ylim(bottom=0)
    axes.grid(color=LINE, alpha=0.5, linewidth=0.6)
    axes.legend(loc="best")


def _ring(axes: Axes, row: SweepRow) -> None:
    x, y = _place(row)
    axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=3)
    axes.annotate(
        row.name, (x, y), xytext=(0, -17), textcoords="offset points", ha="center", fontsize=8.5
    )


def _place(row: SweepRow) -> tuple[float, float]:
    return float(row.l0 or 0.0), float(row.nmse or 0.0)


def _columns(rows: list[SweepRow]) -> tuple[list[float], list[float]]:
    places = [_place(row) for row in rows]
    return [x for x, _ in places], [y for _, y in places]
