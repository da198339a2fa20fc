import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.saes.config import SAEConfig
from visae.saes.prefixes import matryoshka_prefixes, random_prefixes
from visae.saes.sparsity import TopK


@given(st.integers(1, 4096))
def test_matryoshka_groups_are_a_sixteenth_an_eighth_a_quarter_and_the_rest(sixteenth):
    n_features = 16 * sixteenth
    ends = matryoshka_prefixes(n_features)
    sizes = [b - a for a, b in zip((0, *ends), ends, strict=False)]
    assert [size / n_features for size in sizes] == [1 / 16, 1 / 8, 1 / 4, 9 / 16]
    SAEConfig(d_model=4, n_features=n_features, sparsity=TopK(k=1), prefixes=ends)


@pytest.mark.parametrize("n_features", [1, 15, 17, 100])
def test_features_that_do_not_divide_into_groups_are_refused(n_features):
    with pytest.raises(ConfigError, match=rf"n_features {n_features}.*multiple of 16"):
        matryoshka_prefixes(n_features)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 10**6))
def test_random_prefixes_are_a_valid_nesting(n_features, n_prefixes, seed):
    drawn = random_prefixes(n_features, n_prefixes, torch.Generator().manual_seed(seed))
    assert len(drawn) == min(n_prefixes, n_features)
    SAEConfig(d_model=4, n_features=n_features, sparsity=TopK(k=1), prefixes=drawn)


def test_random_prefixes_follow_the_pareto_law():
    """Of single draws, a length of at most l has the chance 1 − (l + 1)^(−1/2), up to the end."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([random_prefixes(1001, 2, generator)[0] for _ in range(2000)])
    whole = 1 - 1001**-0.5
    for most in (1, 10, 100):
        expected = (1 - (most + 1) ** -0.5) / whole
        assert float((lengths <= most).float().mean()) == pytest.approx(expected, abs=0.04)


def test_one_seed_draws_the_same_prefixes():
    first, same, other = (
        random_prefixes(500, 10, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == same != other
