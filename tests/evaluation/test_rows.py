import io

import numpy as np
import pytest
from rich.console import Console

from visae.evaluation.rows import Metric, chance, compared, plain, uncomputed
from visae.evaluation.table import card_table
from visae.statistics.estimates import Estimate
from visae.statistics.resampling import Resampling, plan_resampling

HIGH = Metric("high", "High", "higher")
LOW = Metric("low", "Low", "lower", "share", "a note")
RNG = np.random.default_rng(0)
OWN, WEAK, STRONG = RNG.normal(3, 1, 50), RNG.normal(1, 1, 50), RNG.normal(2, 1, 50)


def mean_figures(plan: Resampling, values: np.ndarray):
    """The mean, and minus the mean, of one value an image."""
    total = plan.total(values)
    return lambda weights: np.stack([s * (weights @ total) / weights.sum(1) for s in (1, -1)])


def constant(value: float) -> Estimate:
    return Estimate(value=value, interval=None, n_images=50, n_units=50)


@pytest.fixture
def rows():
    plan = plan_resampling(50, n_resamples=1000, seed=0)
    figures = {
        name: mean_figures(plan, values)
        for name, values in {"sae": OWN, "weak": WEAK, "strong": STRONG}.items()
    }
    fixed = {"fixed": [constant(0.5), constant(-0.5)]}
    return compared([HIGH, LOW], figures, plan, constants=fixed)


def test_values_nulls_and_paired_differences_with_intervals(rows):
    high, low = rows
    assert high.value.value == pytest.approx(OWN.mean())
    assert {name: e.value for name, e in high.nulls.items()} == pytest.approx(
        {"weak": WEAK.mean(), "strong": STRONG.mean(), "fixed": 0.5}
    )
    assert high.difference.null == "strong"
    assert high.difference.estimate.value == pytest.approx((OWN - STRONG).mean())
    error = (OWN - STRONG).std(ddof=1) / 50**0.5
    width = high.difference.estimate.interval.high - high.difference.estimate.interval.low
    assert width == pytest.approx(2 * 2.01 * error, rel=0.15)
    # Lower is better: the strongest null is the most negative one.
    assert low.difference.null == "strong"
    assert low.difference.estimate.value == pytest.approx(-(OWN - STRONG).mean())


def test_a_null_that_does_not_follow_the_images_can_be_the_strongest():
    plan = plan_resampling(50, n_resamples=1000, seed=0)
    figures = {"sae": lambda w: mean_figures(plan, OWN)(w)[:1]}
    (row,) = compared([HIGH], figures, plan, constants={"fixed": [constant(9.0)]})
    assert row.difference.null == "fixed"
    assert row.difference.estimate.value == pytest.approx(OWN.mean() - 9)
    shift = row.difference.estimate.interval.low - row.value.interval.low
    assert shift == pytest.approx(-9)


def test_a_metric_without_a_better_side_has_no_strongest_null():
    row = plain(Metric("x", "X", "neither"), {"sae": 1.0, "null": 2.0}, n_images=3, note="why")
    assert row.difference is None
    assert row.nulls["null"].value == 2


def test_a_plain_row_says_why_it_has_no_interval():
    row = plain(LOW, {"sae": 0.1, "a": 0.4, "b": 0.3}, n_images=3, note="why")
    assert (row.value.interval, row.value.note) == (None, "why")
    assert (row.difference.null, row.difference.estimate.value) == ("b", pytest.approx(-0.2))


def test_chance_is_the_mean_and_range_of_the_draws():
    draws = np.arange(101.0)
    found = chance(draws, level=0.9, n_images=7, what="shuffles")
    assert found.value == 50
    assert (found.interval.low, found.interval.high) == pytest.approx((5, 95))
    assert "90 % of 101 shuffles" in found.note


def printed(rows) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(card_table("Title", rows))
    return console.export_text()


def test_the_table_prints_the_strongest_null_and_every_reason(rows):
    missing = uncomputed(HIGH._replace(title="Absent"), "there is nothing", n_images=0)
    text = printed([*rows, missing])
    for part in ("High ↑", "Low ↓", "strong 2"):
        assert part in text
    assert "weak 1" not in text
    assert "Absent" in text
    assert "there is nothing" in text
