"""Whether the statistics keep their promises over many simulated experiments (RIGOR §7).

Every rate is compared with the exact binomial 95 % band around what was promised; seeds are
fixed, so a failure means that the method changed.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from visae.statistics.estimates import cohens_dz, mean_interval
from visae.statistics.power import images_needed
from visae.statistics.significance import correct, paired_permutation

N_EXPERIMENTS = 200
ALPHA = 0.05
GROUP_SIZES = np.array([2, 9, 4, 6, 3, 5, 8, 2, 7, 4] * 4)
GROUPS = np.repeat(np.arange(len(GROUP_SIZES)), GROUP_SIZES)


def band(share: float, trials: int = N_EXPERIMENTS) -> tuple[int, int]:
    """Counts that a binomial with this share gives in 95 % of cases."""
    low, high = stats.binom.interval(0.95, trials, share)
    return int(low), int(high)


def clustered(rng: np.random.Generator, mean: float) -> np.ndarray:
    """Images whose groups differ as much as images within a group do."""
    return mean + rng.normal(size=len(GROUP_SIZES))[GROUPS] + rng.normal(size=len(GROUPS))


def p_values(draw: Callable[[np.random.Generator], np.ndarray], **options: object) -> np.ndarray:
    rng = np.random.default_rng(10_000)
    return np.array(
        [
            paired_permutation(draw(rng), n_permutations=999, seed=k, **options).p_value
            for k in range(N_EXPERIMENTS)
        ]
    )


NULLS: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], dict[str, object]]] = {
    "normal": (lambda rng: rng.normal(size=40), {}),
    "heavy tails": (lambda rng: rng.standard_t(2, size=40), {}),
    "skewed": (lambda rng: rng.exponential(size=80) - 1, {}),
    "few images": (lambda rng: rng.normal(size=11), {}),
    "clustered": (lambda rng: clustered(rng, 0.0), {"groups": GROUPS.tolist()}),
    "one-sided": (lambda rng: rng.normal(size=40), {"alternative": "less"}),
}


@pytest.mark.parametrize("name", NULLS)
def test_the_permutation_test_is_wrong_as_often_as_alpha_says(name: str) -> None:
    draw, options = NULLS[name]
    p = p_values(draw, **options)
    low, high = band(ALPHA)
    assert low <= (p <= ALPHA).sum() <= high
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_clustered_images_taken_as_independent_are_wrong_far_too_often() -> None:
    p = p_values(lambda rng: clustered(rng, 0.0))
    assert (p <= ALPHA).sum() > 2 * band(ALPHA)[1]


PLANTED: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], float]] = {
    "normal": (lambda rng: rng.normal(0.3, 1.0, 40), 0.3),
    "few": (lambda rng: rng.normal(-2.0, 0.1, 8), -2.0),
    "skewed": (lambda rng: rng.exponential(0.5, 60), 0.5),
    "rare": (lambda rng: (rng.random(100) < 0.1).astype(float), 0.1),
    "clustered": (lambda rng: clustered(rng, 0.3), 0.3),
}


@pytest.mark.parametrize("name", PLANTED)
def test_intervals_cover_planted_effects(name: str) -> None:
    draw, truth = PLANTED[name]
    groups = GROUPS.tolist() if name == "clustered" else None
    rng, covered = np.random.default_rng(1), 0
    for k in range(N_EXPERIMENTS):
        interval = mean_interval(draw(rng), groups=groups, n_resamples=1000, seed=k).interval
        covered += interval is not None and interval.low <= truth <= interval.high
    low, high = band(0.95)
    assert low <= covered <= high


def test_intervals_cover_planted_standardised_effects() -> None:
    rng, covered = np.random.default_rng(2), 0
    for k in range(N_EXPERIMENTS):
        interval = cohens_dz(rng.normal(0.5, 1.0, 50), n_resamples=1000, seed=k).interval
        covered += interval is not None and interval.low <= 0.5 <= interval.high
    low, high = band(0.95)
    assert low <= covered <= high


def test_intervals_that_ignore_groups_cover_far_too_rarely() -> None:
    rng, covered = np.random.default_rng(1), 0
    for k in range(N_EXPERIMENTS):
        interval = mean_interval(clustered(rng, 0.3), n_resamples=1000, seed=k).interval
        covered += interval is not None and interval.low <= 0.3 <= interval.high
    assert covered < band(0.95)[0] - 20


@pytest.mark.parametrize("effect", [0.5, 0.8])
def test_power_is_the_power_planned(effect: float) -> None:
    images = images_needed(effect)
    p = p_values(lambda rng: rng.normal(effect, 1.0, images))
    low, high = band(0.8)
    assert low <= (p < ALPHA).sum() <= high


def test_corrected_p_values_hold_the_family_error() -> None:
    """A family of 20 nulls has no false discovery in 95 % of experiments."""
    p = np.random.default_rng(4).random((N_EXPERIMENTS, 20))
    false = sum((correct(row, method="bh") <= ALPHA).any() for row in p)
    low, high = band(ALPHA)
    assert low <= false <= high
    assert (p <= ALPHA).any(axis=1).sum() > 100
