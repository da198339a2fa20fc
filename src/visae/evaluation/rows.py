"""The rows of a report card: each metric with its nulls and the difference to the strongest.

Main names: ``MetricRow``, ``Difference``, ``compared``, ``uncomputed``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from visae.statistics.estimates import Estimate, Interval
from visae.statistics.resampling import Figures, Resampling, Weights

__all__ = [
    "Better",
    "Difference",
    "Metric",
    "MetricRow",
    "chance",
    "compared",
    "plain",
    "uncomputed",
]

Better = Literal["higher", "lower", "neither"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The metric less its strongest null, on the same images."""

    null: str
    """The null with the best value."""
    estimate: Estimate
    """Value less null; with an interval where images can be resampled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of an SAE."""

    name: str
    """The metric, as a key."""
    title: str
    """The metric, as a heading."""
    value: Estimate
    """Its value; None where it cannot be computed, and the estimate's note says why."""
    nulls: dict[str, Estimate]
    """The same metric for what has learned nothing."""
    difference: Difference | None
    """Against the strongest null; None where better is neither, or there is no null."""
    better: Better
    """Which way is good."""
    unit: str
    """What the value counts; empty for a number without unit."""
    p_value: float | None = None
    """Share of label permutations, the observed one among them, that do as well."""
    note: str = ""
    """What else one has to know to read the row."""


class Metric(NamedTuple):
    """A metric, before it is measured."""

    name: str
    title: str
    better: Better
    unit: str = ""
    note: str = ""


def uncomputed(metric: Metric, reason: str, *, n_images: int) -> MetricRow:
    """A row that says why there is no number."""
    missing = Estimate(value=None, interval=None, n_images=n_images, n_units=n_images, note=reason)
    return _row(metric, missing, {}, {})


def compared(
    metrics: Sequence[Metric],
    figures: Mapping[str, Callable[[Weights], Figures]],
    resampling: Resampling,
    *,
    constants: Mapping[str, Sequence[Estimate]],
) -> list[MetricRow]:
    """Rows whose values, nulls and differences have intervals over the same resamples.

    Args:
        metrics: The metrics, in the order of the figures.
        figures: What gives every metric from weighted images, for the SAE (first) and each null.
        resampling: How images are resampled.
        constants: Nulls that do not follow the images, with an estimate of each metric.
    """
    own, *nulls = figures

    def all_figures(weights: Weights) -> Figures:
        values = {name: of_weights(weights) for name, of_weights in figures.items()}
        less = [values[own] - values[null] for null in nulls]
        fixed = [values[own] - _column(constants[null]) for null in constants]
        return np.concatenate([*values.values(), *less, *fixed])

    estimates = resampling.estimates(all_figures)
    blocks = [estimates[i : i + len(metrics)] for i in range(0, len(estimates), len(metrics))]
    names = [*nulls, *constants]
    of_nulls = {**dict(zip(nulls, blocks[1:], strict=False)), **constants}
    differences = dict(zip(names, blocks[1 + len(nulls) :], strict=True))
    return [
        _row(
            metric,
            blocks[0][k],
            {name: of_nulls[name][k] for name in names},
            {name: differences[name][k] for name in names},
        )
        for k, metric in enumerate(metrics)
    ]


def plain(metric: Metric, values: Mapping[str, float], *, n_images: int, note: str) -> MetricRow:
    """A row of numbers that have no interval over images, for the reason in ``note``."""

    def estimate(value: float) -> Estimate:
        return Estimate(value=value, interval=None, n_images=n_images, n_units=n_images, note=note)

    own, *nulls = values
    return _row(
        metric,
        estimate(values[own]),
        {name: estimate(values[name]) for name in nulls},
        {name: estimate(values[own] - values[name]) for name in nulls},
    )


def chance(
    draws: Float64[np.ndarray, " draw"], *, level: float, n_images: int, what: str
) -> Estimate:
    """The mean of chance outcomes, with the range in which a share ``level`` of them lie."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(
        value=float(draws.mean()),
        interval=Interval(low=float(low), high=float(high), level=level),
        n_images=n_images,
        n_units=n_images,
        note=f"the interval is where {100 * level:g} % of {len(draws)} {what} lie",
    )


def _column(estimates: Sequence[Estimate]) -> Float[np.ndarray, "figure 1"]:
    values = [np.nan if e.value is None else e.value for e in estimates]
    return np.array(values)[:, None]


def _row(
    metric: Metric,
    value: Estimate,
    nulls: dict[str, Estimate],
    differences: Mapping[str, Estimate],
) -> MetricRow:
    strongest = _strongest(metric.better, nulls)
    return MetricRow(
        name=metric.name,
        title=metric.title,
        value=value,
        nulls=nulls,
        difference=None
        if strongest is None
        else Difference(null=strongest, estimate=differences[strongest]),
        better=metric.better,
        unit=metric.unit,
        note=metric.note,
    )


def _strongest(better: Better, nulls: Mapping[str, Estimate]) -> str | None:
    values = {name: e.value for name, e in nulls.items() if e.value is not None}
    if better == "neither" or not values:
        return None
    sign = 1 if better == "higher" else -1
    return max(values, key=lambda name: sign * values[name])
