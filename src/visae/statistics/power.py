"""How many images an experiment needs, from the paired t-test's exact power.

d_z = 0.5 needs 34 images for 80 % power at α = 0.05, two-sided; d_z = 0.2 needs 199.
Source: RIGOR §6; Cohen 1988.

Main names: ``images_needed``, ``power_of``, ``images_to_settle``.
"""

import math
from typing import Literal

from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.estimates import Estimate
from visae.statistics.units import check_count, check_share

__all__ = ["images_needed", "images_to_settle", "power_of"]

Sides = Literal[1, 2]

_SMALLEST_DZ = 1e-4  # would need 785 million images


def power_of(n_images: int, effect_dz: float, *, alpha: float = 0.05, sides: Sides = 2) -> float:
    """Probability that a paired t-test of this many images finds an effect of this size.

    Exact for normal differences: P(|t| > t_α) under the noncentral t with n − 1 degrees of
    freedom and noncentrality d_z √n. One-sided, the effect lies on the predicted side.
    """
    check_count(n_images, 2, "n_images")
    check_share(alpha, "alpha")
    freedom, shift = n_images - 1, abs(effect_dz) * math.sqrt(n_images)
    threshold = stats.t.isf(alpha / sides, freedom)
    power = float(stats.nct.sf(threshold, freedom, shift))
    # scipy gives NaN for the wrong tail of some large shifts, where it is below Φ(−6) < 1e-9.
    if sides == 2 and shift < 6:
        power += float(stats.nct.cdf(-threshold, freedom, shift))
    return power


def images_needed(
    effect_dz: float, *, alpha: float = 0.05, power: float = 0.8, sides: Sides = 2
) -> int:
    """The fewest images (or groups) that find an effect of this size with this power.

    Raises:
        ExperimentError: on an effect below 0.0001, which no experiment could find.
    """
    check_share(power, "power")
    if not abs(effect_dz) >= _SMALLEST_DZ:
        raise ExperimentError(
            f"An effect of d_z = {effect_dz} needs more images than there are",
            where="effect_dz",
            fix=f"Give an effect of at least {_SMALLEST_DZ:g}",
        )
    enough = 2
    while power_of(enough, effect_dz, alpha=alpha, sides=sides) < power:
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if power_of(middle, effect_dz, alpha=alpha, sides=sides) < power:
            too_few = middle
        else:
            enough = middle
    return enough


def images_to_settle(
    estimate: Estimate, boundary: float, *, alpha: float | None = None, power: float = 0.8
) -> int | None:
    """Images with which such an estimate would lie clear of a boundary, with this power.

    It takes the observed value as the true one and reads the spread of the units off the half of
    the interval that faces the boundary, so clustering in groups is paid for. ``alpha`` is that
    of the interval unless given. None if there is no interval, or no distance to the boundary.
    """
    if estimate.value is None or estimate.interval is None:
        return None
    interval, n_units = estimate.interval, estimate.n_units
    facing = interval.low if estimate.value > boundary else interval.high
    half_width, distance = abs(estimate.value - facing), abs(estimate.value - boundary)
    if half_width == 0 or distance == 0:
        return None
    error = half_width / stats.t.isf((1 - interval.level) / 2, n_units - 1)
    effect_dz = distance / (error * math.sqrt(n_units))
    if effect_dz < _SMALLEST_DZ:
        return None
    level_alpha = 1 - interval.level if alpha is None else alpha
    units = images_needed(effect_dz, alpha=level_alpha, power=power)
    return math.ceil(units * estimate.n_images / n_units)
