"""Rows of a report card as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from visae.evaluation.rows import MetricRow
from visae.statistics.estimates import Estimate

__all__ = ["card_table"]

_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


def card_table(title: str, rows: Sequence[MetricRow]) -> Table:
    """One line a metric: value, every null, difference to the strongest null, and notes.

    Numbers in brackets are intervals; ↑ and ↓ say which way is better.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("metric", "value", "nulls", "less the strongest null", "note"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        nulls = "\n".join(f"{name} {_text(null)}" for name, null in row.nulls.items())
        table.add_row(
            row.title + _ARROWS[row.better], _text(row.value), nulls, _difference(row), _note(row)
        )
    return table


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return "none"
    if estimate.interval is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.interval.low:.3g} to {estimate.interval.high:.3g})"


def _difference(row: MetricRow) -> str:
    if row.difference is None:
        return ""
    text = f"{_text(row.difference.estimate)}\n{row.difference.null}"
    return text if row.p_value is None else f"{text}\np = {row.p_value:.2g} by permuted labels"


def _note(row: MetricRow) -> str:
    """Why there is no number, or how to read it."""
    if row.value.value is None:
        return row.value.note
    return "; ".join(part for part in (row.note, row.value.note) if part)
