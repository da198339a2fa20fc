"""Whether intervals of ranking scores cover the score of all images there could be (RIGOR §7)."""

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import average_precision_score

from visae.evaluation.probes import rank_codes, weighted_scores
from visae.saes.codes import SparseCodes
from visae.statistics.resampling import plan_resampling

N_EXPERIMENTS = 100


def draw(n_images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and activations that are silent below a threshold."""
    positive = rng.random(n_images) < 0.2
    return positive, np.maximum(rng.normal(size=n_images) + 1.5 * positive - 0.5, 0)


def test_intervals_cover_the_average_precision_of_the_population():
    rng = np.random.default_rng(0)
    truth = average_precision_score(*draw(200_000, rng))
    covered = 0
    for seed in range(N_EXPERIMENTS):
        positive, values = draw(120, rng)
        column = rank_codes(SparseCodes.from_dense(torch.tensor(values)[:, None])).column(0)
        plan = plan_resampling(120, n_resamples=1000, seed=seed)
        (found,) = plan.estimates(
            lambda w, c=column, p=positive: weighted_scores(c, p, w, n_top=16)[0][None]
        )
        covered += found.interval.low <= truth <= found.interval.high
    low, high = stats.binom.interval(0.95, N_EXPERIMENTS, 0.95)
    assert low <= covered <= high
