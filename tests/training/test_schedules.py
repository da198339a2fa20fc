import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.saes.config import SAEConfig
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.schedules import KSchedule, PenaltySchedule, RateSchedule

STEPS = st.integers(1, 5000)


def naive_factor(step, n_steps, warmup, decay_share):
    """Linear from 0 (before the first step) to 1, flat, linear to 0 (after the last step)."""
    rise = (step + 1) / (warmup + 1)
    fall = (n_steps - step) / (n_steps * decay_share) if decay_share else 1.0
    return min(1.0, rise) * min(1.0, fall)


@pytest.mark.parametrize(
    ("n_steps", "warmup", "decay_share", "expected_warmup"),
    [
        (100, None, 0.2, 5),
        (100, 10, 0.2, 10),
        (100, 0, 0.0, 0),
        (40_000, None, 0.2, 1000),
        (19, None, 0.2, 0),
    ],
)
def test_the_rate_rises_stays_and_falls(n_steps, warmup, decay_share, expected_warmup):
    made = RateSchedule(warmup_steps=warmup, decay_share=decay_share)
    for step in range(0, n_steps, max(1, n_steps // 100)):
        naive = naive_factor(step, n_steps, expected_warmup, decay_share)
        found = made.factor(step, n_steps)
        assert found == pytest.approx(naive, abs=0.06 if n_steps < 20 else 1e-9)


@given(STEPS, st.floats(0, 1), st.none() | st.integers(0, 500))
def test_the_rate_is_positive_at_every_step_and_at_most_its_peak(n_steps, decay_share, warmup):
    made = RateSchedule(decay_share=decay_share, warmup_steps=warmup)
    factors = [made.factor(step, n_steps) for step in {0, n_steps // 2, n_steps - 1}]
    assert all(0 < factor <= 1 for factor in factors)


@given(STEPS)
def test_the_penalty_rises_over_the_first_twentieth(n_steps):
    made = PenaltySchedule()
    for step in {0, n_steps // 30, n_steps // 20, n_steps - 1}:
        assert made.factor(step, n_steps) == min(1.0, (step + 1) / max(1, n_steps // 20))


def test_the_penalty_rises_as_long_as_asked():
    made = PenaltySchedule(warmup_share=0.5)
    assert [made.factor(step, 8) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert PenaltySchedule(warmup_share=0.0).factor(0, 8) == 1.0


def config(sparsity, n_features=64):
    return SAEConfig(d_model=4, n_features=n_features, sparsity=sparsity)


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_k_falls_to_its_own_value(kind):
    made = KSchedule(start=3.0, decay_share=0.4)
    found = [made.at(config(kind(k=10)), step, 10) for step in range(7)]
    assert found == [kind(k=k) for k in (30, 25, 20, 15, 10, 10, 10)]


@given(STEPS, st.floats(1, 20), st.floats(0, 1), st.integers(1, 64))
def test_k_is_never_above_the_features_nor_below_its_own(n_steps, start, share, k):
    made = KSchedule(start=start, decay_share=share)
    found = [made.at(config(TopK(k=k)), step, n_steps).k for step in range(0, n_steps, 97)]
    assert found == sorted(found, reverse=True)
    assert all(k <= each <= 64 for each in found)
    assert found[0] == min(64, round(k * start))


def test_k_stays_without_a_schedule_and_other_kinds_have_none():
    assert KSchedule().at(config(TopK(k=7)), 0, 100) == TopK(k=7)
    assert KSchedule(start=4.0).at(config(ReLU(l1=0.5)), 0, 100) == ReLU(l1=0.5)


@pytest.mark.parametrize(
    ("schedule", "changes", "said"),
    [
        (RateSchedule, {"warmup_steps": -1}, "warmup_steps is -1"),
        (RateSchedule, {"decay_share": 1.5}, "decay_share is 1.5"),
        (RateSchedule, {"decay_share": math.nan}, "decay_share is nan"),
        (PenaltySchedule, {"warmup_share": -0.1}, "warmup_share is -0.1"),
        (KSchedule, {"start": 0.5}, "start is 0.5"),
        (KSchedule, {"start": math.nan}, "start is nan"),
        (KSchedule, {"decay_share": 2.0}, "decay_share is 2.0"),
    ],
)
def test_impossible_schedules_are_refused(schedule, changes, said):
    with pytest.raises(ConfigError, match=said):
        schedule(**changes)
