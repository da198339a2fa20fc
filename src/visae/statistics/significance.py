"""P-values by counting, and their correction for the number of tests.

A permutation p-value is (1 + #{chance outcomes that reach the observed one}) / (1 + B): it is
never zero, and B decides how small it can get. Source: RIGOR §6; Phipson & Smyth 2010.

Main names: ``paired_permutation`` (images as the source of chance), ``direction_null`` (control
directions as the source of chance), ``correct``, ``reach_problem``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.units import (
    Groups,
    check_count,
    check_finite,
    check_share,
    sample_units,
)

__all__ = [
    "Alternative",
    "Correction",
    "PermutationTest",
    "correct",
    "direction_null",
    "draws_needed",
    "paired_permutation",
    "reach_problem",
    "smallest_reachable_p",
]

Alternative = Literal["less", "greater", "two-sided"]
Correction = Literal["bh", "by", "bonferroni", "none"]

_CHUNK = 2**21  # signs held at once: 16 MiB as float64
_ROUNDING = 1e-12  # relative difference below which two float64 sums count as equal


@dataclass(frozen=True, kw_only=True)
class PermutationTest:
    """How often chance does as much as was observed."""

    statistic: float
    """What was observed."""
    p_value: float
    """Share of chance outcomes, the observed one among them, that reach the statistic."""
    n_permutations: int
    """Chance outcomes drawn, or enumerated where there are few."""
    smallest_p: float
    """The smallest p-value that this many chance outcomes could have given."""


def paired_permutation(
    differences: Real[np.ndarray, " image"],
    *,
    groups: Groups | None = None,
    alternative: Alternative = "two-sided",
    n_permutations: int = 10_000,
    seed: int,
) -> PermutationTest:
    """Whether the mean paired difference is larger than sign flips of the differences give.

    T is the mean difference over images and T* the same after a random sign for every image, or
    for every group as a whole: p = (1 + #{|T*| ≥ |T|}) / (1 + B), without the bars if one-sided.
    Where there are at most B sign patterns, all of them are counted (the observed one is among
    them, so nothing is added).

    Raises:
        ExperimentError: on fewer than two units, NaN or infinity, groups of another length, or
            no permutations.
    """
    check_count(n_permutations, 1, "n_permutations")
    sample = sample_units(differences, groups)
    shares = sample.sum_by_unit(sample.values) / len(sample.values)
    total, n_units = shares.sum(), len(shares)
    reached = _upper_tail(total, alternative) - _ROUNDING * np.abs(shares).sum()
    exact = 2**n_units <= n_permutations
    n_patterns = 2**n_units if exact else n_permutations
    patterns = _all_patterns(n_units) if exact else _random_patterns(n_units, n_patterns, seed)
    hits = 0
    for flips in patterns:
        hits += int((_upper_tail(total - 2.0 * (flips @ shares), alternative) >= reached).sum())
    fewest_exact = 2 if alternative == "two-sided" else 1  # a pattern and its mirror image
    return PermutationTest(
        statistic=float(total),
        p_value=hits / n_patterns if exact else (1 + hits) / (1 + n_patterns),
        n_permutations=n_patterns,
        smallest_p=fewest_exact / n_patterns if exact else smallest_reachable_p(n_patterns),
    )


def direction_null(
    effect: float,
    null_effects: Real[np.ndarray, " draw"],
    *,
    alternative: Alternative,
) -> PermutationTest:
    """Whether the edit's effect is larger than the effects of control directions.

    One-sided p = (1 + #{T_rand ≥ T}) / (1 + B), with ≤ for "less". Two-sided it is twice the
    smaller of the two, since the effects of control directions need not lie around zero.

    Args:
        effect: Effect of the edit, averaged over images.
        null_effects: The same average for each control direction.
        alternative: The side on which the effect was predicted.

    Raises:
        ExperimentError: on no control directions, NaN or infinity.
    """
    check_count(len(null_effects), 1, "number of control directions")
    check_finite(np.append(null_effects, effect), "effects")
    slack = _ROUNDING * max(abs(effect), float(np.abs(null_effects).max()))
    smallest = smallest_reachable_p(len(null_effects))
    greater = smallest * (1 + int((null_effects >= effect - slack).sum()))
    less = smallest * (1 + int((null_effects <= effect + slack).sum()))
    two_sided = min(1.0, 2 * min(greater, less))
    return PermutationTest(
        statistic=float(effect),
        p_value={"greater": greater, "less": less, "two-sided": two_sided}[alternative],
        n_permutations=len(null_effects),
        smallest_p=min(1.0, 2 * smallest) if alternative == "two-sided" else smallest,
    )


def correct(
    p_values: Float[np.ndarray, " test"],
    *,
    method: Correction,
    family_size: int | None = None,
) -> Float[np.ndarray, " test"]:
    """P-values corrected for the number of tests, in the order given.

    Args:
        p_values: The p-values at hand.
        method: Benjamini–Hochberg, Benjamini–Yekutieli, Bonferroni, or none.
        family_size: Number of candidates searched, where that is more than the p-values at
            hand; the absent ones count as p = 1.

    Raises:
        ExperimentError: on no p-values, one outside 0 to 1, or a family smaller than given.
    """
    n_tests = len(p_values) if family_size is None else family_size
    check_count(len(p_values), 1, "number of p-values")
    check_count(n_tests, len(p_values), "family_size")
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ExperimentError(
            "A p-value is not between 0 and 1",
            where=f"p_values {p_values[:8].tolist()}",
            fix="Give the p_value of each test",
        )
    exact = p_values.astype(np.float64)
    if method == "none":
        return exact
    if method == "bonferroni":
        return np.minimum(1.0, exact * n_tests)
    family = np.concatenate([exact, np.ones(n_tests - len(exact))])
    corrected: np.ndarray[Any, Any] = stats.false_discovery_control(family, method=method)
    return corrected[: len(exact)]


def smallest_reachable_p(n_draws: int) -> float:
    """The smallest p-value that B random draws can give: 1 / (1 + B)."""
    check_count(n_draws, 1, "number of draws")
    return 1 / (1 + n_draws)


def draws_needed(alpha: float, n_tests: int = 1) -> int:
    """Draws B ≥ m/α with which one of m tests alone can be below α after correction."""
    check_share(alpha, "alpha")
    check_count(n_tests, 1, "number of tests")
    return math.ceil(n_tests / alpha * (1 - _ROUNDING))


def reach_problem(n_draws: int, *, alpha: float, n_tests: int = 1) -> str | None:
    """Why no test could be significant with this many draws, or None if one could.

    It is the bound for a test that succeeds alone; Benjamini–Hochberg needs fewer draws where
    several succeed together.
    """
    needed = draws_needed(alpha, n_tests)
    if n_draws >= needed:
        return None
    tests = "one test" if n_tests == 1 else f"{n_tests} tests"
    return (
        f"{n_draws} draws give no p below {smallest_reachable_p(n_draws):.2g}, which is not "
        f"enough for {alpha:g} after correction for {tests}: draw at least {needed}"
    )


def _upper_tail(
    means: Float[np.ndarray, "..."] | np.float64, alternative: Alternative
) -> Float[np.ndarray, "..."] | np.float64:
    """The means turned so that larger is always more extreme."""
    if alternative == "two-sided":
        return np.abs(means)
    return means if alternative == "greater" else -means


# scipy.stats.permutation_test gives the same p-values by sorting an index array per draw, which
# takes 20 times as long at 1 000 images.
def _random_patterns(
    n_units: int, n_patterns: int, seed: int
) -> Iterator[Int[np.ndarray, "pattern unit"]]:
    """Blocks of 0/1 rows that say which units change sign, drawn at random."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n_units)
    for start in range(0, n_patterns, rows):
        yield generator.integers(0, 2, (min(rows, n_patterns - start), n_units), dtype=np.int8)


def _all_patterns(n_units: int) -> Iterator[Int[np.ndarray, "pattern unit"]]:
    """One block of all the 0/1 rows."""
    yield (np.arange(2**n_units)[:, None] >> np.arange(n_units)) & 1
