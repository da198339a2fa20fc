import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.activations.statistics import SiteStatistics, add_up, token_kinds
from visae.errors import ConfigError, StoreError
from visae.models.layout import Layout


def activations(n_images=30, n_tokens=4, d_model=6, *, seed=0, scale=1.0):
    """Skewed activations: every dimension has its own mean and spread, every position too."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((n_images, n_tokens, d_model))
    means = generator.normal(size=(n_tokens, d_model)) * 3
    return torch.from_numpy(noise * np.arange(1, d_model + 1) * scale + means)


def statistics(values, *, shard_images=7):
    return add_up(map(SiteStatistics.of, values.split(shard_images)))


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
    np.testing.assert_allclose(found.mean_square, (naive**2).mean(0), rtol=1e-12)
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
    parts = [SiteStatistics.of(part) for part in (values[:0], values, values[:0])]
    found, plain = add_up(parts), parts[1]
    assert found.n_images == 30
    assert torch.equal(found.mean, plain.mean)
    assert torch.equal(found.scatter, plain.scatter)


def test_positions_stand_beside_each_other():
    values = activations()
    parts = [SiteStatistics.of(values[:, at]) for at in (slice(1), slice(1, 3), slice(3, None))]
    found, whole = parts[0].beside(parts[1]).beside(parts[2]), SiteStatistics.of(values)
    assert (found.n_images, found.n_tokens) == (30, 120)
    torch.testing.assert_close(found.position_mean, whole.position_mean, rtol=1e-14, atol=1e-14)
    assert torch.equal(found.norm_histogram, whole.norm_histogram)
    assert found.scale == pytest.approx(whole.scale, rel=1e-12)
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["all", "special", "patches"])
def test_kinds_of_tokens_are_where_the_policy_puts_them(kept):
    layout = Layout(special=("cls", "register0"), grid=(2, 3))
    kinds = token_kinds(layout, kept)
    tokens = ["cls", "register0", *(f"patch{i}" for i in range(6))][layout.kept(kept)]
    found = {kind: tokens[at] for kind, at in kinds.items()}
    expected = {"special": tokens[:2], "patches": tokens[-6:]}
    assert found == {k: v for k, v in expected.items() if kept in ("all", k)}


def test_a_model_without_special_tokens_has_patches_alone():
    assert token_kinds(Layout(special=(), grid=(2, 3)), "all") == {"patches": slice(0, 6)}


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_covariances_stand_large_means(offset, dtype):
    values = (activations(200) + offset).to(dtype)
    naive = np.cov(flat(values), rowvar=False, bias=True)
    spread = np.sqrt(np.diag(naive))
    error = statistics(values).covariance.numpy() - naive
    assert np.abs(error / np.outer(spread, spread)).max() < 1e-6
    np.testing.assert_allclose(statistics(values).variance, np.diag(naive), rtol=1e-9)


def test_eigenpairs_are_the_directions_that_vary_most():
    values = activations(500)
    pairs = statistics(values).eigenpairs(3)
    naive_values, naive_vectors = np.linalg.eigh(np.cov(flat(values), rowvar=False, bias=True))
    np.testing.assert_allclose(pairs.values, naive_values[::-1][:3], rtol=1e-5)
    assert pairs.vectors.shape == (3, 6)
    for vector, naive in zip(pairs.vectors.numpy(), naive_vectors.T[::-1], strict=False):
        assert vector[np.abs(vector).argmax()] > 0
        assert abs(vector @ naive) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("n_pairs", [0, 7])
def test_as_many_eigenpairs_as_dimensions(n_pairs):
    with pytest.raises(ConfigError, match=f"6 eigenpairs, not {n_pairs}"):
        statistics(activations()).eigenpairs(n_pairs)


def test_what_is_written_is_read():
    found = statistics(activations())
    copy = SiteStatistics.of_tensors(found.tensors("a/"), "a/")
    assert copy.n_images == 30
    for name, tensor in found.tensors().items():
        assert torch.equal(copy.tensors()[name], tensor)


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
        SiteStatistics.of(part, rounding=e.sum((0, 2)))
        for part, e in zip(stored.split(7), error.split(7), strict=True)
    ]
    found = add_up(parts)
    naive = flat(stored)
    spread = ((naive - naive.mean(0)) ** 2).sum()
    assert found.rounding_error == pytest.approx(np.sqrt(error.numpy().sum() / spread), rel=1e-10)
    assert 1e-4 < found.rounding_error < 2**-8


def test_no_shards_have_no_statistics():
    with pytest.raises(StoreError, match="no shards"):
        add_up([])
