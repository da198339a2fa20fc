"""BCa bootstrap intervals, one or many at once, from scipy.

Main name: ``bca``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from visae.statistics.units import check_count

__all__ = ["Ends", "Resampled", "bca"]

# What a statistic gives: one number per resample, or several.
Resampled = Float[np.ndarray, "*figure_and_resample"] | np.float64

_CHUNK = 2**21  # numbers held at once while resampling: 16 MiB of float64


class Ends(NamedTuple):
    """The intervals of one or several figures."""

    low: Float[np.ndarray, "*figure"] | np.float64
    """Lower ends; NaN where BCa has none."""
    high: Float[np.ndarray, "*figure"] | np.float64
    """Upper ends; NaN where BCa has none."""
    standard_error: Float[np.ndarray, "*figure"] | np.float64
    """Standard deviation over the resamples."""


def bca(
    statistic: Callable[..., Resampled],
    columns: tuple[Shaped[np.ndarray, " unit"], ...],
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> Ends:
    """BCa intervals (Efron 1987) of a statistic of units that are resampled whole.

    The statistic takes resampled columns and ``axis``. The tail share is Φ(−√(n/(n−1)) · t_{n−1})
    in place of Φ(−z), without which bootstrap intervals of few units are too narrow (Hesterberg
    2015, "expanded percentile", §4).

    Raises:
        ExperimentError: on fewer than 1 000 resamples.
    """
    check_count(n_resamples, 1000, "n_resamples")
    n_units = len(columns[0])
    quantile = math.sqrt(n_units / (n_units - 1)) * stats.t.isf((1 - level) / 2, n_units - 1)
    result = stats.bootstrap(
        columns,
        statistic,
        paired=len(columns) > 1,
        vectorized=True,
        method="BCa",
        confidence_level=1 - 2 * stats.norm.sf(quantile),
        n_resamples=n_resamples,
        batch=max(1, _CHUNK // n_units),
        rng=seed,
    )
    low, high = result.confidence_interval
    return Ends(low, high, result.standard_error)
