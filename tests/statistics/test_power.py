import math

import numpy as np
import pytest
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.estimates import Estimate, Interval, mean_interval
from visae.statistics.power import images_needed, images_to_settle, power_of


@pytest.mark.parametrize(
    ("effect", "power", "sides", "images"),
    [  # G*Power 3.1, means: difference between two dependent means, α = 0.05
        (0.2, 0.80, 2, 199),
        (0.5, 0.80, 2, 34),
        (0.8, 0.80, 2, 15),
        (0.5, 0.95, 2, 54),
        (0.5, 0.80, 1, 27),
    ],
)
def test_images_needed_are_those_of_the_tables(
    effect: float, power: float, sides: int, images: int
) -> None:
    assert images_needed(effect, power=power, sides=sides) == images
    assert images_needed(-effect, power=power, sides=sides) == images


@pytest.mark.parametrize("effect", [0.07, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_images_needed_are_the_fewest_that_suffice(effect: float, alpha: float) -> None:
    images = images_needed(effect, alpha=alpha, power=0.9)
    assert power_of(images, effect, alpha=alpha) >= 0.9
    assert images == 2 or power_of(images - 1, effect, alpha=alpha) < 0.9


def test_power_is_the_share_of_t_tests_that_succeed() -> None:
    samples = np.random.default_rng(3).normal(0.6, 1.0, (20_000, 15))
    for sides, alternative in ((2, "two-sided"), (1, "greater")):
        p = stats.ttest_1samp(samples, 0, axis=1, alternative=alternative).pvalue
        assert power_of(15, 0.6, sides=sides) == pytest.approx((p < 0.05).mean(), abs=0.014)


def test_power_without_effect_is_alpha() -> None:
    assert power_of(10, 0.0, alpha=0.03) == pytest.approx(0.03)
    assert power_of(10, 0.0, alpha=0.03, sides=1) == pytest.approx(0.03)


def test_power_is_a_number_that_grows_with_images_and_effect() -> None:
    effects = np.geomspace(1e-3, 100, 40)
    table = np.array([[power_of(n, d) for d in effects] for n in (2, 3, 10, 51, 1000, 10**6)])
    assert np.isfinite(table).all()
    assert ((table >= 0.05 - 1e-9) & (table <= 1 + 1e-9)).all()
    assert (np.diff(table, axis=0) > -1e-9).all()
    assert (np.diff(table, axis=1) > -1e-9).all()


def test_a_small_effect_needs_the_normal_number() -> None:
    expected = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 0.001) ** 2
    assert images_needed(0.001) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: images_needed(0.0), "d_z = 0.0"),
        (lambda: images_needed(math.nan), "d_z = nan"),
        (lambda: images_needed(0.5, power=1.0), "power is 1.0"),
        (lambda: images_needed(0.5, alpha=0.0), "alpha is 0.0"),
        (lambda: power_of(1, 0.5), "n_images is 1"),
    ],
)
def test_refuses(call, words: str) -> None:
    with pytest.raises(ExperimentError, match=words):
        call()


def t_estimate(value: float, deviation: float, images: int, units: int) -> Estimate:
    half = stats.t.isf(0.025, units - 1) * deviation / math.sqrt(units)
    interval = Interval(low=value - half, high=value + half, level=0.95)
    return Estimate(value=value, interval=interval, n_images=images, n_units=units)


def test_images_to_settle_are_those_of_the_distance_to_the_boundary() -> None:
    estimate = t_estimate(0.5, 1.0, 20, 20)
    assert images_to_settle(estimate, 0.0) == images_needed(0.5) == 34
    assert images_to_settle(estimate, 0.3) == images_needed(0.2) == 199
    assert images_to_settle(estimate, 1.0) == images_needed(0.5)
    assert images_to_settle(estimate, 0.0, power=0.95) == 54
    assert images_to_settle(estimate, 0.0, alpha=0.001) == images_needed(0.5, alpha=0.001)


def test_images_to_settle_pay_for_groups() -> None:
    """34 groups of five images each are needed where the group is the unit."""
    assert images_to_settle(t_estimate(0.5, 1.0, 50, 10), 0.0) == 34 * 5


def test_images_to_settle_read_the_side_that_faces_the_boundary() -> None:
    interval = Interval(low=0.4, high=2.0, level=0.95)
    estimate = Estimate(value=0.5, interval=interval, n_images=30, n_units=30)
    narrow, wide = images_to_settle(estimate, 0.4), images_to_settle(estimate, 0.6)
    assert narrow is not None
    assert wide is not None
    assert narrow < wide


def test_images_to_settle_is_close_for_a_bootstrap_interval() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, 100)
    found = images_to_settle(mean_interval(values, seed=1), 0.0)
    assert found == pytest.approx(images_needed(values.mean() / values.std(ddof=1)), rel=0.1)


@pytest.mark.parametrize(
    "estimate",
    [
        Estimate(value=0.5, interval=None, n_images=3, n_units=3),
        Estimate(value=None, interval=None, n_images=9, n_units=9),
        t_estimate(0.2, 1.0, 20, 20),
        t_estimate(0.5, 0.0, 20, 20),
        t_estimate(0.2 + 1e-9, 1.0, 20, 20),
    ],
)
def test_images_to_settle_is_none_where_no_number_would_do(estimate: Estimate) -> None:
    assert images_to_settle(estimate, 0.2) is None
