import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.activations.statistics import SiteStatistics, partial_sums
from visae.errors import StoreError


def activations(n_images=30, n_tokens=4, d_model=6, *, seed=0, scale=1.0):
    """Skewed activations: every dimension has its own mean and spread, every position too."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((n_images, n_tokens, d_model))
    means = generator.normal(size=(n_tokens, d_model)) * 3
    return torch.from_numpy(noise * np.arange(1, d_model + 1) * scale + means)


def statistics(values, *, shard_images=7):
    return SiteStatistics.merge(map(partial_sums, values.split(shard_images)))


def flat(values):
    return values.double().flatten(0, 1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_are_those_of_all_tokens(dtype):
    values = activations().to(dtype)
    found, naive = statistics(values), flat(values)
    assert (found.n_images, found.n_tokens) == (30, 120)
    np.testing.assert_allclose(found.mean, naive.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, naive.var(0), rtol=1e-10)
    np.testing.assert_allclose(found.position_mean, values.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.square_sum, (naive**2).sum(0), rtol=1e-12)
    assert found.scale == pytest.approx(np.sqrt(naive.var(0).mean()), rel=1e-12)


@given(st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_normalised_activations_have_mean_square_norm_d(shard_images, scale, seed):
    values = activations(scale=scale, seed=seed)
    found = statistics(values, shard_images=shard_images)
    normal = (flat(values) - found.mean.numpy()) / found.scale
    assert (normal**2).sum(1).mean() == pytest.approx(values.shape[2], rel=1e-9)


def test_the_cut_into_shards_does_not_matter():
    values = activations()
    one, many = statistics(values, shard_images=30), statistics(values, shard_images=1)
    torch.testing.assert_close(one.mean, many.mean, rtol=1e-13, atol=0)
    assert one.scale == pytest.approx(many.scale, rel=1e-13)
    assert torch.equal(one.norm_histogram, many.norm_histogram)


def test_an_empty_shard_adds_nothing():
    values = activations()
    parts = [partial_sums(part) for part in (values[:0], values, values[:0])]
    found, plain = SiteStatistics.merge(parts), SiteStatistics.merge(parts[1:2])
    assert found.n_images == 30
    assert torch.equal(found.mean, plain.mean)


def test_positions_can_be_chosen():
    values = activations()
    found, naive = statistics(values).at(slice(1, 3)), flat(values[:, 1:3])
    assert found.n_tokens == 60
    np.testing.assert_allclose(found.mean, naive.mean(0), rtol=1e-12)
    assert found.scale == pytest.approx(np.sqrt(naive.var(0).mean()), rel=1e-12)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_of_norms_are_right_within_a_bin(q):
    values = activations(200)
    naive = np.quantile(np.linalg.norm(flat(values), axis=1), q, method="inverted_cdf")
    assert naive <= statistics(values).norm_quantile(q) <= naive * 1.0235


def test_norms_beyond_the_histogram_fall_into_its_ends():
    values = torch.tensor([[[1e-9]], [[1e9]]])
    found = statistics(values)
    assert float(found.norm_histogram.sum()) == 2
    assert found.norm_quantile(0.0) == pytest.approx(1e-4, rel=0.03)
    assert found.norm_quantile(1.0) == pytest.approx(1e6)


def test_outlier_dimensions_are_named():
    values = activations()
    values[:, :, 4] += 1000
    assert statistics(values).outlier_dimensions == [4]
    assert statistics(activations()).outlier_dimensions == []


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -7.3])
def test_equal_activations_have_no_scale(value):
    with pytest.raises(StoreError, match=r"All activations .* equal.*Record another site"):
        _ = statistics(torch.full((30, 4, 6), value)).scale


def test_what_the_number_format_costs():
    values = activations(100).float()
    stored = values.bfloat16()
    error = (stored.double() - values.double()).square()
    parts = [
        partial_sums(part, rounding=e.sum((0, 2)))
        for part, e in zip(stored.split(7), error.split(7), strict=True)
    ]
    found = SiteStatistics.merge(parts)
    naive = flat(stored)
    spread = ((naive - naive.mean(0)) ** 2).sum()
    assert found.rounding_error == pytest.approx(np.sqrt(error.numpy().sum() / spread), rel=1e-10)
    assert 1e-4 < found.rounding_error < 2**-8
    some = found.at(slice(2, 3))
    naive = flat(stored[:, 2:3])
    spread = ((naive - naive.mean(0)) ** 2).sum()
    assert some.rounding_error == pytest.approx(
        np.sqrt(error.numpy()[:, 2].sum() / spread), rel=1e-10
    )


def test_no_shards_have_no_statistics():
    with pytest.raises(StoreError, match="no shards"):
        SiteStatistics.merge([])
