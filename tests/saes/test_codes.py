import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from visae.saes.codes import SparseCodes, active_entries

DENSE = arrays(
    "float32",
    array_shapes(min_dims=2, max_dims=2, max_side=8),
    elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]) | st.floats(0, 10, width=32),
).map(torch.from_numpy)


@given(DENSE)
def test_dense_activations_survive_the_round_trip(dense):
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.dense(), dense)
    assert codes.n_tokens == dense.shape[0]
    assert torch.equal(codes.counts, (dense > 0).sum(1))
    assert (codes.values > 0).all()


@given(DENSE)
def test_entries_know_their_tokens(dense):
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(dense[codes.tokens, codes.features], codes.values)
    assert (codes.tokens.diff() >= 0).all()


@given(DENSE)
def test_what_is_not_positive_is_no_entry(dense):
    assert SparseCodes.from_dense(-dense).values.numel() == 0


@given(DENSE)
def test_active_entries_are_those_of_nonzero(dense):
    tokens, features = active_entries(dense > 1)
    naive = torch.nonzero(dense > 1, as_tuple=True)
    assert torch.equal(tokens, naive[0])
    assert torch.equal(features, naive[1])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_image_maxima_are_the_dense_ones(n_images, tokens_per_image, n_features, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_images * tokens_per_image, n_features, generator=generator).relu()
    found = SparseCodes.from_dense(dense).max_per_image(tokens_per_image)
    naive = dense.view(n_images, tokens_per_image, n_features).amax(1)
    assert (found.n_tokens, found.n_features) == (n_images, n_features)
    assert torch.equal(found.dense(), naive)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_joined_codes_are_the_codes_of_joined_tokens(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, 5, generator=generator).relu() for size in sizes]
    joined = SparseCodes.join([SparseCodes.from_dense(part) for part in parts])
    assert torch.equal(joined.dense(), torch.cat(parts))
    assert joined.n_features == 5


def test_codes_without_tokens():
    codes = SparseCodes.from_dense(torch.zeros(0, 4))
    assert codes.offsets.tolist() == [0]
    assert codes.dense().shape == (0, 4)
    assert codes.max_per_image(3).n_tokens == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_keep_their_precision(dtype):
    dense = torch.rand(4, 5).to(dtype)
    assert SparseCodes.from_dense(dense).dense().dtype == dtype
