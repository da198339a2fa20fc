import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig

STEPS = st.integers(1, 5000)


def config(n_steps, **changes):
    return TrainConfig(n_tokens=n_steps * 8, batch_size=8, **changes)


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
    made = config(n_steps, warmup_steps=warmup, decay_share=decay_share)
    for step in range(0, n_steps, max(1, n_steps // 100)):
        naive = naive_factor(step, n_steps, expected_warmup, decay_share)
        assert made.rate_factor(step) == pytest.approx(naive, abs=0.06 if n_steps < 20 else 1e-9)


@given(STEPS, st.floats(0, 1), st.none() | st.integers(0, 500))
def test_the_rate_is_positive_at_every_step_and_at_most_its_peak(n_steps, decay_share, warmup):
    made = config(n_steps, decay_share=decay_share, warmup_steps=warmup)
    factors = [made.rate_factor(step) for step in {0, n_steps // 2, n_steps - 1}]
    assert all(0 < factor <= 1 for factor in factors)


def test_the_penalty_rises_over_the_first_twentieth():
    made = config(200)
    assert [made.penalty_share(step) for step in (0, 4, 9, 10, 199)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert config(5).penalty_share(0) == 1.0


@pytest.mark.parametrize(
    ("n_features", "n_steps", "expected"),
    [
        (16384, 20_000, 2e-4),
        (16384, 10**6, 2e-4),
        (4096, 20_000, 4e-4),
        (16384, 5_000, 4e-4),
        (16384, 1, 32e-4),
    ],
)
def test_the_default_learning_rate(n_features, n_steps, expected):
    run = RunConfig(name="a", n_features=n_features)
    assert run.peak_learning_rate(n_steps) == pytest.approx(expected)


def test_a_given_learning_rate_is_kept():
    assert RunConfig(name="a", n_features=16, learning_rate=0.5).peak_learning_rate(3) == 0.5


@pytest.mark.parametrize(
    ("n_tokens", "given_tokens", "expected"),
    [(1000, None, 100), (10**9, None, 10**7), (8, None, 1), (1000, 7, 7), (1000, 0, 0)],
)
def test_when_a_feature_counts_as_dead(n_tokens, given_tokens, expected):
    made = TrainConfig(n_tokens=n_tokens, batch_size=8, n_dead_tokens=given_tokens)
    assert made.dead_after == expected


def test_matryoshka_is_a_choice():
    nested = RunConfig(name="a", n_features=32, sparsity=TopK(k=2)).sae_config(4)
    flat = RunConfig(name="a", n_features=30, sparsity=TopK(k=2), matryoshka=False).sae_config(4)
    assert nested.prefixes == (2, 6, 14, 32)
    assert flat.prefixes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_tokens": 0}, "must be positive"),
        ({"batch_size": -1}, "must be positive"),
        ({"log_steps": 0}, "must be positive"),
        ({"n_tokens": 5}, "less than one batch of 8"),
        ({"decay_share": 1.5}, "decay_share is 1.5"),
        ({"decay_share": math.nan}, "decay_share is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"auxk_alpha": -1.0}, "auxk_alpha is -1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"n_dead_tokens": -1}, "n_dead_tokens is -1"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds is nan"),
    ],
)
def test_impossible_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**{"n_tokens": 80, "batch_size": 8, **changes})


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_an_impossible_learning_rate_is_refused(rate):
    with pytest.raises(ConfigError, match="learning_rate is"):
        RunConfig(name="a", n_features=16, learning_rate=rate)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ConfigError, match="cannot be the name of a folder"):
        RunConfig(name=name, n_features=16)
