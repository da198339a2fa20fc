import math

import pytest

from visae.errors import ConfigError
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig


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
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"auxk_alpha": -1.0}, "auxk_alpha is -1.0"),
        ({"n_dead_tokens": -1}, "n_dead_tokens is -1"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds is nan"),
        ({"checkpoint_tokens": 0}, "checkpoint_tokens is 0"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
        ({"average_decay": math.nan}, "average_decay is nan"),
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


def test_what_is_seen_kept_and_computed_on_does_not_shape_an_sae():
    one = TrainConfig(n_tokens=80, batch_size=8)
    other = TrainConfig(
        n_tokens=80,
        batch_size=8,
        log_steps=3,
        checkpoint_seconds=1.0,
        checkpoint_tokens=8,
        engine="torch",
        device="cpu",
        shared="tokens",
        track="wandb",
    )
    assert one.shape == other.shape
    assert one.shape != TrainConfig(n_tokens=80, batch_size=8, average_decay=0.9).shape
