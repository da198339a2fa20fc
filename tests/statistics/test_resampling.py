import numpy as np
import pytest
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics import resampling
from visae.statistics.estimates import mean_interval
from visae.statistics.resampling import Resampling, plan_resampling

RNG = np.random.default_rng(5)
VALUES = RNG.exponential(size=40)
SIZES = RNG.uniform(1, 3, size=40)


def mean_of(plan: Resampling, *columns: np.ndarray):
    """Statistic: the mean over images of each column."""
    totals = [plan.total(column) for column in columns]
    images = plan.total(np.ones(len(plan.units)))
    return lambda weights: np.stack([weights @ total / (weights @ images) for total in totals])


@pytest.mark.parametrize("groups", [None, [k // 4 for k in range(40)]])
def test_the_mean_has_the_interval_of_mean_interval(groups):
    plan = plan_resampling(40, groups=groups, n_resamples=4000, seed=3)
    (found,) = plan.estimates(mean_of(plan, VALUES))
    expected = mean_interval(VALUES, groups=groups, n_resamples=4000, seed=3)
    assert found.value == pytest.approx(VALUES.mean())
    assert (found.n_images, found.n_units) == (expected.n_images, expected.n_units)
    width = expected.interval.high - expected.interval.low
    assert found.interval.low == pytest.approx(expected.interval.low, abs=0.05 * width)
    assert found.interval.high == pytest.approx(expected.interval.high, abs=0.05 * width)


def test_a_ratio_of_sums_has_scipys_interval():
    plan = plan_resampling(40, n_resamples=4000, seed=3)
    top, bottom = plan.total(VALUES), plan.total(SIZES)
    (found,) = plan.estimates(lambda w: (w @ top / (w @ bottom))[None])
    expected = stats.bootstrap(
        (VALUES, SIZES),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=4000,
        rng=9,
        confidence_level=1 - 2 * stats.norm.sf(np.sqrt(40 / 39) * stats.t.isf(0.025, 39)),
    ).confidence_interval
    assert found.value == pytest.approx(VALUES.sum() / SIZES.sum())
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected), rel=0.05)


def test_figures_of_one_call_share_their_resamples():
    plan = plan_resampling(40, n_resamples=1000, seed=3)
    first, second, difference = plan.estimates(
        lambda w: np.concatenate(
            [m := mean_of(plan, VALUES + 1, VALUES)(w), m[:1] - m[1:]],
        )
    )
    assert first.interval.low - second.interval.low == pytest.approx(1)
    assert difference.value == pytest.approx(1)
    assert difference.interval.high - difference.interval.low < 1e-9


def test_what_has_no_interval_says_why():
    plan = plan_resampling(40, n_resamples=1000, seed=3)
    constant, undefined = plan.estimates(
        lambda w: np.stack([np.full(len(w), 0.5), np.full(len(w), np.nan)])
    )
    assert (constant.interval.low, constant.interval.high) == (0.5, 0.5)
    assert "same in every resample" in constant.note
    assert (undefined.value, undefined.interval) == (None, None)
    assert "undefined" in undefined.note
    few = plan_resampling(5, seed=0)
    (estimate,) = few.estimates(mean_of(few, VALUES[:5]))
    assert estimate.value == pytest.approx(VALUES[:5].mean())
    assert estimate.interval is None
    assert "5 of the 6 independent units" in estimate.note


def test_a_statistic_that_fails_in_some_resamples_has_no_interval():
    plan = plan_resampling(8, n_resamples=1000, seed=3)
    first = plan.total(np.eye(8)[0])
    (estimate,) = plan.estimates(lambda w: (w @ first / (w @ first))[None])
    assert estimate.value == 1
    assert estimate.interval is None
    assert "no interval" in estimate.note


def test_many_units_are_pooled_and_keep_their_standard_error(monkeypatch):
    values = np.random.default_rng(0).exponential(size=4000)
    exact = mean_interval(values, n_resamples=1000, seed=1).interval
    monkeypatch.setattr(resampling, "_MOST_UNITS", 400)
    plan = plan_resampling(4000, n_resamples=1000, seed=1)
    assert plan.n_units == 400
    (found,) = plan.estimates(mean_of(plan, values))
    assert found.n_units == 4000
    assert found.value == pytest.approx(values.mean())
    width = exact.high - exact.low
    assert found.interval.high - found.interval.low == pytest.approx(width, rel=0.15)


def test_one_seed_gives_one_interval():
    plans = [plan_resampling(40, n_resamples=1000, seed=s) for s in (1, 1, 2)]
    a, b, c = (plan.estimates(mean_of(plan, VALUES))[0].interval for plan in plans)
    assert a == b != c


@pytest.mark.parametrize("groups", [["a", "a", "a"], [None, "a", "a"]])
def test_one_or_two_units_give_a_value_without_an_interval(groups):
    plan = plan_resampling(3, groups=groups, seed=0)
    (found,) = plan.estimates(mean_of(plan, VALUES[:3]))
    assert found.value == pytest.approx(VALUES[:3].mean())
    assert found.interval is None
    assert found.n_units == len(set(groups))


def test_groups_of_another_length_are_refused():
    with pytest.raises(ExperimentError, match="3 images have 2 groups"):
        plan_resampling(3, groups=["a", "b"], seed=0)
