"""Estimates with intervals, for outcomes measured once per image.

Intervals are BCa bootstrap intervals over images, or over whole groups of images; a seed always
gives the same numbers. What the data cannot carry is None with a note, never a silent NaN.
Source: RIGOR §6.

Main names: ``mean_interval``, ``cohens_dz``, ``dose_response``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.bca import Resampled, bca
from visae.statistics.units import (
    Groups,
    UnitSample,
    check_finite,
    check_share,
    sample_units,
)

__all__ = [
    "DoseResponse",
    "Estimate",
    "Interval",
    "cohens_dz",
    "dose_response",
    "mean_interval",
    "units_needed",
]

# What scipy hands to a statistic: the original units, or one row of units per resample.
Column = Float[np.ndarray, "*resample unit"]

_ROUNDING = 1e-12  # relative spread of values that are equal but for float64 rounding
_LARGEST_DZ = 1e6  # beyond it a resampled d_z only says that its resample was constant


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The range that covers the true value in a share ``level`` of experiments."""

    low: float
    """Lower end, in the units of the estimate."""
    high: float
    """Upper end, in the units of the estimate."""
    level: float
    """Coverage, above 0 and below 1."""

    def __post_init__(self) -> None:
        check_share(self.level, "level")
        if not self.low <= self.high:
            raise ExperimentError(
                f"An interval runs from {self.low} to {self.high}",
                where="interval",
                fix="Give its lower end first, both as numbers",
            )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval; what could not be computed is None and ``note`` says why."""

    value: float | None
    """The estimate from all images; None where it is undefined."""
    interval: Interval | None
    """Its bootstrap interval; None where the data cannot carry one."""
    n_images: int
    """Images the value was computed from."""
    n_units: int
    """Independent units among them: the images, or their groups."""
    note: str = ""
    """Why the value or the interval is missing or has no width; empty if all is well."""

    def describe(self) -> str:
        """The estimate as a phrase: value, interval, number of images."""
        value = "undefined" if self.value is None else f"{self.value:.3g}"
        sample = f"{self.n_images} images"
        if self.n_units != self.n_images:
            sample += f" in {self.n_units} groups"
        if self.interval is None:
            return f"{value} (no interval, {sample})"
        low, high, level = self.interval.low, self.interval.high, 100 * self.interval.level
        return f"{value} ({level:g} % interval {low:.3g} to {high:.3g}, {sample})"


@dataclass(frozen=True, kw_only=True)
class DoseResponse:
    """How regularly the outcome follows the dose."""

    rho: Estimate
    """Spearman's ρ of dose and outcome within an image, averaged over images."""
    n_constant: int
    """Images whose outcome is the same at every dose; each counts as ρ = 0."""


def mean_interval(
    values: Real[np.ndarray, " image"],
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int,
) -> Estimate:
    """The mean over images with its BCa bootstrap interval (Efron 1987).

    With groups, whole groups are resampled and the mean stays the mean over images: the ratio
    Σ_g total_g / Σ_g size_g. An image whose group is None is a group of its own. Equal values
    give an interval without width, and a note. Below ``units_needed(level)`` units there is no
    interval, only a note. Very skewed outcomes are covered less often than stated: lognormal
    ones with σ = 1 in 91 % of experiments of 60 images. Time grows with the square of the
    images: 0.1 s for 1 000, 5 s for 20 000.

    Raises:
        ExperimentError: on fewer than two units, NaN or infinity, or groups of another length.
    """
    sample = sample_units(values, groups)
    mean, totals = sample.mean, sample.sum_by_unit(sample.values)

    def resampled_mean(totals: Column, sizes: Column, axis: int) -> Resampled:
        result: Resampled = totals.sum(axis) / sizes.sum(axis)
        return result

    if note := _too_few(sample, level):
        return _estimate(sample, mean, None, note)
    if _is_constant(totals / sample.sizes):
        note = "every unit has the same value, which does not show how far others would differ"
        return _estimate(sample, mean, Interval(low=mean, high=mean, level=level), note)
    interval = _bca_interval(
        resampled_mean, (totals, sample.sizes), level=level, n_resamples=n_resamples, seed=seed
    )
    return _estimate(sample, mean, interval)


def cohens_dz(
    differences: Real[np.ndarray, " image"],
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int,
) -> Estimate:
    """Cohen's d_z = mean(Δ) / sd(Δ) of paired differences, with its BCa bootstrap interval.

    The standard deviation is that over images (n − 1 in the denominator), also with groups.
    Differences that are all equal have no d_z: the value is None and the note says so.

    Raises:
        ExperimentError: as ``mean_interval``.
    """
    sample = sample_units(differences, groups)
    if _is_constant(sample.values):
        return _estimate(sample, None, None, "every difference is the same: d_z is undefined")
    mean, deviation = sample.mean, float(np.std(sample.values, ddof=1))
    if note := _too_few(sample, level):
        return _estimate(sample, mean / deviation, None, note)

    def resampled_dz(
        totals: Column, centred: Column, squares: Column, sizes: Column, axis: int
    ) -> Resampled:
        size = sizes.sum(axis)
        variance = squares.sum(axis) - centred.sum(axis) ** 2 / size
        variance = variance / np.maximum(size - 1, 1)
        # A constant resample would divide by zero; held finite, it is still the most extreme.
        spread = np.sqrt(np.maximum(variance, (1e-9 * deviation) ** 2))
        result: Resampled = totals.sum(axis) / size / spread
        return result

    per_image = (sample.values, sample.centred, sample.centred**2)
    columns = (*(sample.sum_by_unit(column) for column in per_image), sample.sizes)
    interval = _bca_interval(resampled_dz, columns, level=level, n_resamples=n_resamples, seed=seed)
    if max(-interval.low, interval.high) > _LARGEST_DZ:
        note = "nearly all differences are the same: d_z has no interval"
        return _estimate(sample, mean / deviation, None, note)
    return _estimate(sample, mean / deviation, interval)


def dose_response(
    doses: Real[np.ndarray, " level"],
    outcomes: Real[np.ndarray, "image dose"],
    *,
    groups: Groups | None = None,
    level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int,
) -> DoseResponse:
    """Spearman's ρ of dose and outcome within each image, averaged, with its interval.

    ``outcomes`` has one column per entry of ``doses``. Tied doses or outcomes share their mean
    rank. An image whose outcome never changes counts as ρ = 0.

    Raises:
        ExperimentError: on fewer than three different doses, shapes that do not match, and as
            ``mean_interval``.
    """
    if doses.ndim != 1 or outcomes.ndim != 2 or outcomes.shape[1] != len(doses):
        raise ExperimentError(
            f"Doses of shape {doses.shape} do not fit outcomes of shape {outcomes.shape}",
            where="dose response",
            fix="Give outcomes of shape (images, doses)",
        )
    check_finite(doses, "doses")
    check_finite(outcomes, "outcomes")
    if len(np.unique(doses)) < 3:
        raise ExperimentError(
            "A dose response needs at least three different doses",
            where=f"doses {doses.tolist()}",
            fix="Add doses to the grid",
        )
    rho = _spearman_per_image(doses, outcomes)
    estimate = mean_interval(rho, groups=groups, level=level, n_resamples=n_resamples, seed=seed)
    return DoseResponse(rho=estimate, n_constant=int((np.ptp(outcomes, axis=1) == 0).sum()))


def units_needed(level: float = 0.95) -> int:
    """Fewest images (or groups) that can carry a bootstrap interval of this level: 6 for 95 %.

    A bootstrap interval of a mean ends where the values end, and the range of n values covers
    the centre of a symmetric distribution with probability 1 − 2^(1−n).
    """
    check_share(level, "level")
    return math.ceil(1 - math.log2(1 - level))


def _bca_interval(
    statistic: Callable[..., Resampled],
    columns: tuple[Float[np.ndarray, " unit"], ...],
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> Interval:
    ends = bca(statistic, columns, level=level, n_resamples=n_resamples, seed=seed)
    return Interval(low=float(ends.low), high=float(ends.high), level=level)


def _spearman_per_image(
    doses: Real[np.ndarray, " dose"], outcomes: Real[np.ndarray, "image dose"]
) -> Float[np.ndarray, " image"]:
    # scipy.stats.spearmanr takes one image a call and gives NaN for a constant outcome.
    dose_ranks = stats.rankdata(doses) - (len(doses) + 1) / 2
    ranks = stats.rankdata(outcomes, axis=1) - (len(doses) + 1) / 2
    lengths = np.linalg.norm(ranks, axis=1) * np.linalg.norm(dose_ranks)
    rho = np.divide(ranks @ dose_ranks, lengths, out=np.zeros(len(ranks)), where=lengths > 0)
    bounded: Float[np.ndarray, " image"] = np.clip(rho, -1.0, 1.0)
    return bounded


def _is_constant(values: Float[np.ndarray, " value"]) -> bool:
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def _too_few(sample: UnitSample, level: float) -> str:
    """Why these units carry no interval, or nothing."""
    found, needed = len(sample.sizes), units_needed(level)
    if found >= needed:
        return ""
    return f"{found} independent units carry no {100 * level:g} % interval: {needed} are needed"


def _estimate(
    sample: UnitSample, value: float | None, interval: Interval | None, note: str = ""
) -> Estimate:
    return Estimate(
        value=value,
        interval=interval,
        n_images=len(sample.values),
        n_units=len(sample.sizes),
        note=note,
    )
