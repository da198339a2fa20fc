"""Whether the statistics keep their promises over many simulated experiments (RIGOR §7).

Every rate is compared with the exact binomial 95 % band around what was promised; seeds are
fixed, so a failure means that the method changed.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from visae.interventions.power import images_needed
from visae.interventions.significance import correct, direction_null, paired_permutation
from visae.interventions.statistics import cohens_dz, mean_interval
from visae.interventions.verdict import Prediction, judge

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


def simulate(
    rng: np.random.Generator, planted: float, n_images: int = 40, n_controls: int = 99
) -> tuple[np.ndarray, np.ndarray]:
    """Effects [image] of the edit and [image, draw] of control directions.

    Every direction, the edit's too, does something of its own to all images (sd 0.5), and every
    image reacts to any edit in its own way.
    """
    image = rng.normal(0.0, 1.0, (n_images, 1))
    direction = rng.normal(0.0, 0.5, n_controls + 1)
    effects = image + direction + rng.normal(0.0, 1.0, (n_images, n_controls + 1))
    return effects[:, 0] + planted, effects[:, 1:]


def run_experiments(planted: float) -> tuple[list[str], int, int]:
    """Verdicts, and how often each of the two tests alone was significant."""
    rng = np.random.default_rng(6)
    prediction = Prediction(direction="decrease", smallest_effect=0.0)
    labels, by_images, by_directions = [], 0, 0
    for k in range(N_EXPERIMENTS):
        edit, controls = simulate(rng, planted)
        differences = edit - controls.mean(axis=1)
        paired = paired_permutation(differences, n_permutations=999, seed=k).p_value
        null = direction_null(edit.mean(), controls.mean(axis=0), alternative="less").p_value
        estimate = mean_interval(differences, n_resamples=1000, seed=k)
        labels.append(judge(estimate, prediction, paired_p=paired, direction_p=null).label)
        by_images += paired <= ALPHA
        by_directions += null <= ALPHA
    return labels, by_images, by_directions


def test_a_random_direction_is_supported_no_more_often_than_alpha() -> None:
    labels, by_images, by_directions = run_experiments(planted=0.0)
    low, high = band(ALPHA)
    assert low <= by_directions <= high
    assert labels.count("supported") <= high
    # Over images alone any direction that does something passes: the verdict needs both tests.
    assert by_images > N_EXPERIMENTS / 2


def test_a_planted_direction_is_supported() -> None:
    labels, _, _ = run_experiments(planted=-3.0)
    assert labels.count("supported") >= 0.95 * N_EXPERIMENTS


def test_a_null_feature_is_refuted_where_images_suffice() -> None:
    """200 images place a mean of 0 short of 0.3 standard deviations with the power of a z-test."""
    rng = np.random.default_rng(8)
    prediction = Prediction(direction="increase", smallest_effect=0.3)
    labels = []
    for k in range(N_EXPERIMENTS):
        differences = rng.normal(0.0, 1.0, 200)
        estimate = mean_interval(differences, n_resamples=1000, seed=k)
        p = paired_permutation(differences, n_permutations=999, seed=k).p_value
        labels.append(judge(estimate, prediction, paired_p=p, direction_p=p).label)
    assert labels.count("supported") == 0
    low, high = band(float(stats.norm.cdf(0.3 * np.sqrt(200) - 1.96)))
    assert low <= labels.count("refuted") <= high
