"""A report card as one page of HTML: every metric beside its nulls."""

from pathlib import Path

from visae.evaluation.card import ReportCard, read_card
from visae.evaluation.rows import MetricRow
from visae.reports.charts import ScoreRow, histogram, score_against_nulls
from visae.reports.page import svg_markup, write_page
from visae.reports.wording import estimated, fixed, number

__all__ = ["write_card_report"]


def write_card_report(folder: Path, out: Path) -> Path:
    """Write the page of an SAE's report card to the path ``out``, and give that path.

    Raises:
        CheckpointError: when the SAE has no report card, or it is damaged.
    """
    card = read_card(folder)
    shown = [row for row in card.rows if _fits_the_chart(row)]
    return write_page(
        out,
        "card.html",
        card=card,
        chart=svg_markup(score_against_nulls([_score(row) for row in shown])) if shown else None,
        chart_words="; ".join(f"{row.title} {estimated(row.value)}" for row in shown),
        lines=[_line(row) for row in card.rows],
        classes=[
            {
                "name": c.name,
                "feature": str(c.feature),
                "discovery": fixed(c.discovery_precision),
                "confirmation": fixed(c.average_precision),
                "top": fixed(c.top_precision),
            }
            for c in card.classes
        ],
        by_position=_by_position(card),
    )


def _fits_the_chart(row: MetricRow) -> bool:
    """Scores between 0 and 1 that have a direction and something to be compared with."""
    values = [row.value.value, *(null.value for null in row.nulls.values())]
    known = [value for value in values if value is not None]
    in_range = all(-0.05 <= value <= 1.05 for value in known)
    return row.better != "neither" and row.value.value is not None and bool(row.nulls) and in_range


def _score(row: MetricRow) -> ScoreRow:
    interval = row.value.interval
    arrow = {"higher": " ↑", "lower": " ↓"}.get(row.better, "")
    return ScoreRow(
        name=row.title + arrow,
        score=row.value.value or 0.0,
        interval=None if interval is None else (interval.low, interval.high),
        nulls={n: e.value for n, e in row.nulls.items() if e.value is not None},
    )


def _line(row: MetricRow) -> dict[str, object]:
    difference = ""
    if row.difference is not None:
        difference = f"{estimated(row.difference.estimate)} ({row.difference.null})"
    if row.p_value is not None:
        difference += f", p = {number(row.p_value, 2)}"
    missing = row.value.value is None
    return {
        "title": row.title,
        "arrow": {"higher": "↑", "lower": "↓", "neither": ""}[row.better],
        "value": "" if missing else estimated(row.value),
        "nulls": [(name, estimated(null)) for name, null in row.nulls.items()],
        "difference": difference,
        "note": row.value.note if missing else row.note,
    }


def _by_position(card: ReportCard) -> object:
    """How the error spreads over positions, as a histogram."""
    known = [value for value in card.nmse_by_position if value is not None]
    if len(known) < 4:
        return None
    low, high = min(known), max(known)
    n_bins = 16
    width = max(1e-9, (high - low) / n_bins)
    edges = [low + width * i for i in range(n_bins + 1)]
    counts = [0] * n_bins
    for value in known:
        counts[min(n_bins - 1, int((value - low) / width))] += 1
    chart = histogram(counts, edges, xlabel="NMSE at a position", ylabel="positions")
    return svg_markup(chart)
