"""Whether verdicts keep their promises over many simulated experiments (RIGOR §7).

Every rate is compared with the exact binomial 95 % band around what was promised; seeds are
fixed, so a failure means that the method changed.
"""

import numpy as np
from scipy import stats

from visae.interventions.verdict import Prediction, judge
from visae.statistics.estimates import mean_interval
from visae.statistics.significance import direction_null, paired_permutation

N_EXPERIMENTS = 200
ALPHA = 0.05


def band(share: float) -> tuple[int, int]:
    """Counts that a binomial with this share gives in 95 % of cases."""
    low, high = stats.binom.interval(0.95, N_EXPERIMENTS, share)
    return int(low), int(high)


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
