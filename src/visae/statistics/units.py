"""Outcomes of images together with the independent units that the images form.

The unit is the image, because patches of one image are not independent; where images come in
groups (a species, a site, a patient) it is the group. Every estimate and test of an experiment
starts from a ``UnitSample``, so input is checked here once. Source: RIGOR §6.

Main names: ``UnitSample``, ``sample_units``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real

from visae.errors import ExperimentError

__all__ = [
    "Groups",
    "UnitSample",
    "check_count",
    "check_finite",
    "check_share",
    "sample_units",
    "unit_codes",
]

Groups = Sequence[str | int | None]


@dataclass(frozen=True, kw_only=True)
class UnitSample:
    """One finite value per image, and the unit that each image belongs to."""

    values: Float[np.ndarray, " image"]
    """Outcome of each image."""
    units: Int[np.ndarray, " image"]
    """Number of the unit of each image, from 0 in order of appearance."""
    sizes: Float[np.ndarray, " unit"]
    """Images in each unit."""

    @property
    def mean(self) -> float:
        """Mean over images."""
        return float(self.values.mean())

    @property
    def centred(self) -> Float[np.ndarray, " image"]:
        """Values less their mean, so that sums of squares keep their digits."""
        return self.values - self.mean

    def sum_by_unit(self, values: Float[np.ndarray, " image"]) -> Float[np.ndarray, " unit"]:
        """Sum of a per-image quantity over each unit."""
        return np.bincount(self.units, weights=values, minlength=len(self.sizes))


def sample_units(values: Real[np.ndarray, "..."], groups: Groups | None) -> UnitSample:
    """Checked float64 values with their units; an image whose group is None is its own unit.

    Raises:
        ExperimentError: on an array that is not one value per image, fewer than two units, NaN or
            infinity, or groups of another length.
    """
    if values.ndim != 1:
        raise ExperimentError(
            f"Outcomes have shape {values.shape}", where="outcomes", fix="Give one value per image"
        )
    if groups is not None and len(groups) != len(values):
        raise ExperimentError(
            f"{len(values)} images have {len(groups)} groups",
            where="groups",
            fix="Give one group per image, or None for an image without one",
        )
    check_finite(values, "outcomes")
    units = np.arange(len(values)) if groups is None else unit_codes(groups)
    sizes = np.bincount(units).astype(np.float64)
    if len(sizes) < 2:
        raise ExperimentError(
            f"{len(sizes)} independent unit{'' if len(sizes) == 1 else 's'} cannot show how much "
            "outcomes vary",
            where=f"{len(values)} images" + ("" if groups is None else ", grouped"),
            fix="Give at least two images, of at least two groups if they are grouped",
        )
    return UnitSample(values=values.astype(np.float64), units=units, sizes=sizes)


def check_finite(values: Real[np.ndarray, "..."], name: str) -> None:
    """Refuse NaN and infinity, naming the first place that holds one."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ExperimentError(
            f"{len(bad)} of {values.size} {name} are not finite numbers",
            where=f"first at {tuple(bad[0].tolist())}",
            fix="Find out why the task gave none there, or leave those images out",
        )


def check_count(count: int, least: int, name: str) -> None:
    """Refuse a count below the least that means something."""
    if count < least:
        raise ExperimentError(f"{name} is {count}", where=name, fix=f"Give at least {least}")


def check_share(share: float, name: str) -> None:
    """Refuse a number that is not strictly between 0 and 1."""
    if not 0.0 < share < 1.0:
        raise ExperimentError(
            f"{name} is {share}", where=name, fix="Give a number above 0 and below 1"
        )


def unit_codes(groups: Groups) -> Int[np.ndarray, " image"]:
    """Number of each image's unit, from 0 in order of appearance; None is a unit of its own."""
    codes: dict[object, int] = {}
    keys = [("image", row) if group is None else group for row, group in enumerate(groups)]
    return np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)
