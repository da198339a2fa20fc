"""Rows of a report card as a table for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from visae.evaluation.rows import MetricRow
from visae.statistics.estimates import Estimate

__all__ = ["card_table"]

_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


def card_table(title: str, rows: Sequence[MetricRow]) -> Table:
    """One line a metric: value, strongest null, and the difference between the two.

    Numbers in brackets are intervals; ↑ and ↓ say which way is better. The other nulls and the
    notes are in the JSON and on the page.
    """
    table = Table(title=title, title_justify="left")
    for heading in ("metric", "value", "strongest null", "difference"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        missing = row.value.value is None
        table.add_row(
            row.title + _ARROWS[row.better],
            f"n/a: {row.value.note}" if missing else _text(row.value),
            _strongest(row),
            _difference(row),
        )
    return table


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return "none"
    if estimate.interval is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.interval.low:.3g} to {estimate.interval.high:.3g})"


def _strongest(row: MetricRow) -> str:
    """The best null, or all of them where none is better than another."""
    if row.difference is not None:
        null = row.nulls[row.difference.null].value
        return f"{row.difference.null} {null:.3g}"
    known = {name: null.value for name, null in row.nulls.items() if null.value is not None}
    return ", ".join(f"{name} {value:.3g}" for name, value in known.items())


def _difference(row: MetricRow) -> str:
    if row.difference is None:
        return ""
    text = _text(row.difference.estimate)
    return text if row.p_value is None else f"{text}, p = {row.p_value:.2g}"
