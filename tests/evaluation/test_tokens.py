import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.evaluation.tokens import EvaluatedTokens, spread_evenly


@given(n_items=st.integers(0, 200), n_wanted=st.integers(0, 250))
def test_even_spreading_gives_ascending_positions_at_equal_distances(n_items, n_wanted):
    found = spread_evenly(n_items, n_wanted)
    assert len(found) == min(n_items, n_wanted)
    if len(found):
        assert found[0] == 0
        assert found[-1] < n_items
    steps = np.diff(found)
    if len(steps):
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


def test_the_mean_is_that_of_the_policys_tokens(make_store):
    x = torch.randn(7, 5, 12, generator=torch.Generator().manual_seed(0))
    store = make_store(x, tokens="all", special=("cls",), shard_sizes=(4, 3))
    tokens = EvaluatedTokens(store, "residual@1", "patches")
    assert (tokens.n_images, tokens.per_image, tokens.n_tokens) == (7, 4, 28)
    torch.testing.assert_close(tokens.mean, x[:, 1:].double().mean((0, 1)))


def test_a_sample_holds_different_tokens_of_the_store(planted):
    sample = planted.tokens.sample(300, seed=4)
    assert sample.shape == (300, 12)
    known = {tuple(row) for row in planted.activations.flatten(0, 1).tolist()}
    drawn = [tuple(row) for row in sample.tolist()]
    assert len(set(drawn)) == 300
    assert set(drawn) <= known


def test_a_sample_is_fixed_by_its_seed_and_never_larger_than_the_store(planted):
    tokens = planted.tokens
    assert torch.equal(tokens.sample(50, seed=1), tokens.sample(50, seed=1))
    assert not torch.equal(tokens.sample(50, seed=1), tokens.sample(50, seed=2))
    assert len(tokens.sample(10_000, seed=0)) == tokens.n_tokens


@pytest.mark.parametrize("n_tokens", [1, 2, 161])
def test_a_small_sample_has_the_size_asked_for(planted, n_tokens):
    assert len(planted.tokens.sample(n_tokens, seed=0)) == n_tokens
