import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.estimates import (
    Estimate,
    Interval,
    cohens_dz,
    dose_response,
    mean_interval,
    units_needed,
)

RNG = np.random.default_rng(20)
SKEWED = RNG.exponential(size=30)


def naive_bca(statistic, units: list[np.ndarray], level: float) -> tuple[float, float]:
    """BCa written out (Efron & Tibshirani 1993, eq. 14.9 to 14.15), one resample at a time."""
    rng = np.random.default_rng(7)
    n = len(units)
    value = statistic(np.concatenate(units))
    boot = np.array(
        [statistic(np.concatenate([units[k] for k in rng.integers(0, n, n)])) for _ in range(4000)]
    )
    bias = stats.norm.ppf(np.mean(boot < value))
    left_out = np.array([statistic(np.concatenate(units[:k] + units[k + 1 :])) for k in range(n)])
    gap = left_out.mean() - left_out
    acceleration = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    tail = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)
    shares = [
        stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-tail, tail)
    ]
    low, high = np.quantile(boot, shares)
    return float(low), float(high)


def assert_close_interval(found: Interval | None, expected: tuple[float, float]) -> None:
    """Within the Monte Carlo error of two bootstraps: a tenth of the width."""
    assert found is not None
    width = expected[1] - expected[0]
    assert found.low == pytest.approx(expected[0], abs=0.1 * width)
    assert found.high == pytest.approx(expected[1], abs=0.1 * width)


def naive_dz(values: np.ndarray) -> float:
    return float(values.mean() / values.std(ddof=1))


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_mean_interval_is_the_naive_bca(level: float) -> None:
    found = mean_interval(SKEWED, level=level, seed=1)
    assert found.value == pytest.approx(SKEWED.mean())
    assert (found.n_images, found.n_units, found.note) == (30, 30, "")
    assert_close_interval(
        found.interval, naive_bca(np.mean, [SKEWED[[k]] for k in range(30)], level)
    )
    assert found.interval is not None
    assert found.interval.level == level


def test_mean_interval_of_groups_resamples_whole_groups() -> None:
    sizes = [3, 1, 7, 2, 5, 4, 6, 2, 9, 3]
    units = [RNG.normal(RNG.normal(), 0.3, size) for size in sizes]
    groups = [f"site {k}" for k, size in enumerate(sizes) for _ in range(size)]
    values = np.concatenate(units)
    order = RNG.permutation(len(values))
    found = mean_interval(values[order], groups=[groups[k] for k in order], seed=1)
    assert (found.value, found.n_images, found.n_units) == (pytest.approx(values.mean()), 42, 10)
    assert_close_interval(found.interval, naive_bca(np.mean, units, 0.95))
    alone = mean_interval(values, seed=1).interval
    assert alone is not None
    assert found.interval is not None
    assert found.interval.high - found.interval.low > 1.3 * (alone.high - alone.low)


def test_singleton_groups_are_the_same_as_no_groups() -> None:
    plain = mean_interval(SKEWED, n_resamples=1000, seed=3)
    assert mean_interval(SKEWED, groups=list(range(30)), n_resamples=1000, seed=3) == plain
    assert mean_interval(SKEWED, groups=[None] * 30, n_resamples=1000, seed=3) == plain


def test_the_seed_fixes_every_number() -> None:
    first = mean_interval(SKEWED, n_resamples=1000, seed=3)
    assert mean_interval(SKEWED, n_resamples=1000, seed=3) == first
    assert mean_interval(SKEWED, n_resamples=1000, seed=4) != first


def test_interval_follows_a_change_of_units() -> None:
    plain = mean_interval(SKEWED, n_resamples=1000, seed=3).interval
    moved = mean_interval(1000.0 + 2.0 * SKEWED, n_resamples=1000, seed=3).interval
    assert plain is not None
    assert moved is not None
    assert moved.low == pytest.approx(1000 + 2 * plain.low)
    assert moved.high == pytest.approx(1000 + 2 * plain.high)


def test_whole_numbers_are_taken_as_they_are() -> None:
    counts = np.arange(20)
    assert mean_interval(counts, n_resamples=1000, seed=1) == mean_interval(
        counts.astype(np.float64), n_resamples=1000, seed=1
    )


def test_normal_data_give_nearly_the_t_interval() -> None:
    values = stats.norm.ppf((np.arange(200) + 0.5) / 200)
    expected = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
    assert_close_interval(mean_interval(values, seed=1).interval, expected)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e9])
def test_equal_values_have_an_interval_without_width(value: float) -> None:
    found = mean_interval(np.full(7, value), seed=1)
    assert found.interval is not None
    assert found.interval.low == found.interval.high == pytest.approx(value)
    assert "same value" in found.note


@pytest.mark.parametrize(("level", "needed"), [(0.5, 2), (0.9, 5), (0.95, 6), (0.99, 8)])
def test_few_units_carry_no_interval(level: float, needed: int) -> None:
    assert units_needed(level) == needed
    assert 1 - 2.0 ** (1 - needed) >= level > 1 - 2.0 ** (2 - needed)
    values = np.arange(float(needed))
    assert mean_interval(values, level=level, n_resamples=1000, seed=1).interval is not None
    for few in (values[:-1], np.zeros(needed - 1)):
        if len(few) < 2:
            continue
        found = mean_interval(few, level=level, n_resamples=1000, seed=1)
        assert found.value == pytest.approx(few.mean())
        assert found.interval is None
        assert f"{needed} are needed" in found.note


def test_groups_count_as_units_where_few() -> None:
    found = mean_interval(np.arange(20.0), groups=[k % 5 for k in range(20)], seed=1)
    assert (found.interval, found.n_units) == (None, 5)


def test_dz_is_the_naive_bca() -> None:
    values = RNG.normal(0.5, 1.0, 40)
    found = cohens_dz(values, seed=2)
    assert found.value == pytest.approx(naive_dz(values))
    assert_close_interval(
        found.interval, naive_bca(naive_dz, [values[[k]] for k in range(40)], 0.95)
    )


def test_dz_of_groups_is_the_naive_bca() -> None:
    units = [RNG.normal(0.5 + RNG.normal(), 0.5, size) for size in [2, 5, 3, 8, 4, 4, 2, 6, 3, 5]]
    groups = [k for k, unit in enumerate(units) for _ in unit]
    found = cohens_dz(np.concatenate(units), groups=groups, seed=2)
    assert found.value == pytest.approx(naive_dz(np.concatenate(units)))
    assert_close_interval(found.interval, naive_bca(naive_dz, units, 0.95))


def test_dz_does_not_depend_on_units_or_lose_digits() -> None:
    values = RNG.normal(0.5, 1.0, 40)
    plain = cohens_dz(values, n_resamples=1000, seed=2).interval
    scaled = cohens_dz(1e-9 * values, n_resamples=1000, seed=2).interval
    assert plain is not None
    assert scaled is not None
    assert scaled.low == pytest.approx(plain.low)
    far = 1e7 + values
    assert cohens_dz(far, n_resamples=1000, seed=2).value == pytest.approx(naive_dz(far))


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_dz_of_equal_differences_is_undefined_and_says_so(value: float) -> None:
    found = cohens_dz(np.full(10, value), seed=1)
    assert (found.value, found.interval) == (None, None)
    assert "d_z is undefined" in found.note


def test_dz_without_a_stable_spread_has_no_interval() -> None:
    nearly_equal = np.array([1.0] * 9 + [2.0])
    found = cohens_dz(nearly_equal, seed=1)
    assert found.value == pytest.approx(naive_dz(nearly_equal))
    assert found.interval is None
    assert "nearly all differences are the same" in found.note


def test_dz_of_mostly_unchanged_images_has_a_finite_interval() -> None:
    found = cohens_dz(np.array([0.0] * 28 + [1.0, 2.0]), seed=1)
    assert found.interval is not None
    assert 0 <= found.interval.low < found.interval.high < 1


def test_dz_of_few_units_has_a_value_without_interval() -> None:
    found = cohens_dz(np.array([1.0, 2.0, 3.0]), seed=1)
    assert (found.value, found.interval) == (pytest.approx(2.0), None)


def test_dose_response_averages_scipys_rho() -> None:
    doses = np.array([-2.0, -1.0, 0.0, 1.0, 1.0, 3.0])
    outcomes = RNG.normal(size=(12, 6)) + doses
    outcomes[0, :3] = outcomes[0, 3]  # ties
    expected = [stats.spearmanr(doses, row).statistic for row in outcomes]
    found = dose_response(doses, outcomes, seed=1, n_resamples=1000)
    assert found.rho.value == pytest.approx(np.mean(expected))
    assert found.n_constant == 0


def test_dose_response_interval_is_that_of_the_mean_rho() -> None:
    doses = np.arange(5)
    outcomes = RNG.normal(size=(12, 5)) + 0.5 * doses
    groups = [k // 2 for k in range(12)]
    rho = np.array([stats.spearmanr(doses, row).statistic for row in outcomes])
    expected = mean_interval(rho, groups=groups, seed=5).interval
    found = dose_response(doses, outcomes, groups=groups, seed=5).rho
    assert found.n_units == 6
    assert expected is not None
    assert_close_interval(found.interval, (expected.low, expected.high))


def test_constant_outcomes_count_as_zero() -> None:
    doses = np.array([0.0, 1.0, 2.0, 4.0])
    outcomes = np.stack([doses, doses, -doses, np.full(4, 0.3), np.zeros(4), doses**3, doses])
    found = dose_response(doses, outcomes, seed=1, n_resamples=1000)
    assert found.n_constant == 2
    assert found.rho.value == pytest.approx((1 + 1 - 1 + 0 + 0 + 1 + 1) / 7)


def test_few_doses_of_whole_numbers_are_ranked() -> None:
    """Doses may come from a configuration as whole numbers."""
    found = dose_response(np.array([3, 1, 2]), np.tile([9, 1, 4], (6, 1)), seed=1)
    assert found.rho.value == pytest.approx(1.0)


def test_a_perfect_dose_response_has_no_width() -> None:
    found = dose_response(np.arange(7), np.tile(np.exp(np.arange(7.0)), (8, 1)), seed=1).rho
    assert found.interval is not None
    assert found.interval.low == found.interval.high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("doses", "outcomes", "words"),
    [
        (np.array([0.0, 1.0]), np.zeros((3, 2)), "three different doses"),
        (np.array([0.0, 1.0, 1.0]), np.zeros((3, 3)), "three different doses"),
        (np.arange(3.0), np.zeros((3, 4)), "do not fit"),
        (np.arange(3.0), np.full((3, 3), np.nan), "9 of 9 outcomes"),
        (np.array([0.0, np.nan, 1.0]), np.zeros((3, 3)), "1 of 3 doses"),
        (np.arange(3.0), np.zeros((1, 3)), "1 independent unit"),
        (np.arange(3.0), np.zeros((0, 3)), "0 independent units"),
    ],
)
def test_dose_response_refuses(doses: np.ndarray, outcomes: np.ndarray, words: str) -> None:
    with pytest.raises(ExperimentError, match=words):
        dose_response(doses, outcomes, seed=1)


@pytest.mark.parametrize("function", [mean_interval, cohens_dz])
def test_estimates_refuse_bad_settings(function) -> None:
    with pytest.raises(ExperimentError, match=r"level is 95\.0"):
        function(SKEWED, level=95.0, seed=1)
    with pytest.raises(ExperimentError, match="n_resamples is 50"):
        function(SKEWED, n_resamples=50, seed=1)
    with pytest.raises(ExperimentError, match="not finite"):
        function(np.array([1.0, np.nan]), seed=1)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.0, 0.0, 0.1, 1.0]), min_size=6, max_size=12),
    st.sampled_from([2, 4, 12]),
)
def test_sparse_outcomes_never_give_nan_or_a_warning(values: list[float], size: int) -> None:
    """Also where whole groups are equal, or all images but one."""
    groups = [row % size for row in range(len(values))]
    for function in (mean_interval, cohens_dz):
        for grouping in (None, groups):
            found = function(np.array(values), groups=grouping, n_resamples=1000, seed=1)
            assert found.value is None or math.isfinite(found.value)
            assert found.interval is not None or found.note
            if found.interval is not None:
                assert math.isfinite(found.interval.low)
                assert math.isfinite(found.interval.high)


def test_an_interval_refuses_ends_that_are_not_ordered() -> None:
    for low, high in ((2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ExperimentError, match="interval"):
            Interval(low=low, high=high, level=0.95)


def test_describe_gives_value_interval_and_size() -> None:
    interval = Interval(low=-0.5, high=0.25, level=0.95)
    estimate = Estimate(value=-0.125, interval=interval, n_images=30, n_units=30)
    assert estimate.describe() == "-0.125 (95 % interval -0.5 to 0.25, 30 images)"
    grouped = Estimate(value=None, interval=None, n_images=30, n_units=4, note="because")
    assert grouped.describe() == "undefined (no interval, 30 images in 4 groups)"
    assert re.search("nan", grouped.describe()) is None
