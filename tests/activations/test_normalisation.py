import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.activations.normalisation import Normalisation
from visae.activations.statistics import SiteStatistics
from visae.errors import StoreError


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_mean_and_scale_are_those_of_all_batches(sizes, offset):
    generator = torch.Generator().manual_seed(sum(sizes))
    tokens = torch.randn(sum(sizes), 4, generator=generator) + offset
    found = Normalisation.of_tokens(tokens.split(sizes))
    exact = tokens.double()
    torch.testing.assert_close(found.mean, exact.mean(0))
    centred = (exact - found.mean) / found.scale
    assert float(centred.square().sum(1).mean()) == pytest.approx(4, rel=1e-9)
    assert found.n_tokens == sum(sizes)


def test_it_is_that_of_statistics_of_the_same_tokens():
    tokens = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    statistics = Normalisation.of_statistics(SiteStatistics.of(tokens))
    measured = Normalisation.of_tokens([tokens.flatten(0, 1)])
    torch.testing.assert_close(statistics.mean, measured.mean)
    assert statistics.scale == pytest.approx(measured.scale)
    assert statistics.n_tokens == measured.n_tokens == 15


@pytest.mark.parametrize("value", [0.0, 3.3, float("nan"), float("inf")])
def test_tokens_that_do_not_vary_are_refused(value):
    with pytest.raises(StoreError, match="equal, or not all are finite"):
        Normalisation.of_tokens([torch.full((9, 4), value)])


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_no_tokens_are_refused(batches):
    with pytest.raises(StoreError, match="There are no tokens"):
        Normalisation.of_tokens(batches)
