"""Intervals for any statistic that can be computed from weighted images.

Ratios of sums and ranking scores are no means over images, but all of them can be computed when
every image counts as often as it was drawn. Several figures of one call share their resamples, so
a difference of two of them is a paired difference. Source: RIGOR §6.

Main names: ``plan_resampling``, ``Resampling``.
"""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.bca import Ends, Resampled, bca
from visae.statistics.estimates import Estimate, Interval, units_needed
from visae.statistics.units import Groups, unit_codes

__all__ = ["Figures", "Resampling", "Weighted", "Weights", "plan_resampling"]

# How often each unit counts, one row per resample; and what a statistic makes of it.
Weights = Float[np.ndarray, "resample unit"]
Figures = Float[np.ndarray, "figure resample"]
Weighted = Callable[[Weights], Figures]

_MOST_UNITS = 4096  # pooled beyond: that many still place a standard error within 1 %
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Which images are drawn together, and how often."""

    units: Int[np.ndarray, " image"]
    """Number of the unit that each image is drawn with."""
    n_units: int
    """Units that are drawn."""
    n_independent: int
    """Independent units there were, before any were pooled."""
    level: float
    """Coverage of the intervals."""
    n_resamples: int
    """Resamples drawn."""
    seed: int
    """Seed of the drawing."""

    def total(self, values: Real[np.ndarray, " image"]) -> Float[np.ndarray, " unit"]:
        """Sum of a per-image quantity over each unit."""
        return np.bincount(self.units, weights=values, minlength=self.n_units)

    def estimates(self, statistic: Weighted) -> list[Estimate]:
        """Each figure of a statistic with its BCa interval.

        A figure that is undefined is None, one that never varies has an interval without width,
        and one for which BCa has no interval has none; the note says which.
        """
        values = statistic(np.ones((1, self.n_units)))[:, 0] + 0.0  # no negative zero
        needed = units_needed(self.level)
        if self.n_units < needed:
            why = f"{self.n_units} of the {needed} independent units that an interval needs"
            return [self._estimate(value, None, why) for value in values]

        def of_indices(indices: Int[np.ndarray, "*resample unit"], axis: int) -> Resampled:
            figures = statistic(_weights(indices, self.n_units))
            return figures if indices.ndim > 1 else figures[:, 0]

        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            ends = bca(
                of_indices,
                (np.arange(self.n_units),),
                level=self.level,
                n_resamples=self.n_resamples,
                seed=self.seed,
            )
        return [self._figure(float(value), ends, row) for row, value in enumerate(values)]

    def _figure(self, value: float, ends: Ends, row: int) -> Estimate:
        low, high, error = (float(np.asarray(end)[row]) for end in ends)
        if error <= _ROUNDING * abs(value):
            note = "it is the same in every resample, which does not show how far others differ"
            return self._estimate(value, Interval(low=value, high=value, level=self.level), note)
        if not low <= high:
            return self._estimate(value, None, "the bootstrap gives no interval here")
        return self._estimate(value, Interval(low=low, high=high, level=self.level))

    def _estimate(self, value: float, interval: Interval | None, note: str = "") -> Estimate:
        is_defined = bool(np.isfinite(value))
        return Estimate(
            value=float(value) if is_defined else None,
            interval=interval if is_defined else None,
            n_images=len(self.units),
            n_units=self.n_independent,
            note=note if is_defined else "it is undefined for these images",
        )


def plan_resampling(
    n_images: int,
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    n_resamples: int = 2_000,
    seed: int,
) -> Resampling:
    """How images, or whole groups of them, are resampled; None is a group of its own.

    Beyond 4 096 units, units are pooled at random into 4 096, so that time and memory stay bounded.

    Raises:
        ExperimentError: on groups of another length.
    """
    if groups is not None and len(groups) != n_images:
        raise ExperimentError(
            f"{n_images} images have {len(groups)} groups",
            where="groups",
            fix="Give one group per image, or None for an image without one",
        )
    units = np.arange(n_images) if groups is None else unit_codes(groups)
    n_independent = len(np.unique(units))
    n_units = min(n_independent, _MOST_UNITS)
    if n_units < n_independent:
        pool = np.random.default_rng(seed).permutation(n_independent) % n_units
        units = pool[units]
    return Resampling(
        units=units,
        n_units=n_units,
        n_independent=n_independent,
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


def _weights(indices: Int[np.ndarray, "*resample drawn"], n_units: int) -> Weights:
    """How often each unit is drawn; a jackknife row draws all but one."""
    rows = np.atleast_2d(indices)
    keys = rows + n_units * np.arange(len(rows))[:, None]
    counts = np.bincount(keys.ravel(), minlength=len(rows) * n_units)
    return counts.reshape(len(rows), n_units).astype(np.float64)
