import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from visae.saes.codes import SparseCodes
from visae.saes.kernels.sparse import FeatureLists, active_values, nested_decode, sparse_decode

D_MODEL = 5


def dense_codes(n_tokens, n_features, share=0.4, seed=0):
    """Non-negative feature activations in which some tokens and some features are all zero."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(n_tokens, n_features, generator=generator, dtype=torch.float64)
    f[torch.rand(n_tokens, n_features, generator=generator) > share] = 0
    f[::4] = 0
    f[:, 1::5] = 0
    return f


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SHAPES = {
    "n_tokens": st.integers(1, 9),
    "n_features": st.integers(1, 12),
    "seed": st.integers(0, 99),
}


@given(**SHAPES)
def test_decoding_is_a_matrix_product(n_tokens, n_features, seed):
    f, w_dec = dense_codes(n_tokens, n_features, seed=seed), randn(n_features, D_MODEL)
    codes = SparseCodes.from_dense(f)
    torch.testing.assert_close(sparse_decode(codes.values, w_dec, codes), f @ w_dec)
    with torch.no_grad():
        torch.testing.assert_close(sparse_decode(codes.values, w_dec, codes), f @ w_dec)


@given(**SHAPES, cuts=st.sets(st.integers(1, 11)))
def test_prefixes_are_matrix_products_with_one_bias_each(n_tokens, n_features, seed, cuts):
    bounds = [*sorted(c for c in cuts if c < n_features), n_features]
    f, w_dec, b_dec = (
        dense_codes(n_tokens, n_features, seed=seed),
        randn(n_features, D_MODEL),
        randn(D_MODEL),
    )
    codes = SparseCodes.from_dense(f)
    rebuilt = nested_decode(codes.values, w_dec, b_dec, FeatureLists(codes), bounds)
    naive = torch.stack([f[:, :m] @ w_dec[:m] + b_dec for m in bounds])
    torch.testing.assert_close(rebuilt, naive)


@pytest.mark.parametrize("bounds", [[8], [2, 8], [1, 2, 5, 8]])
def test_gradients_of_decoding(bounds):
    codes = SparseCodes.from_dense(dense_codes(6, 8))
    lists = FeatureLists(codes)
    inputs = [codes.values.clone(), randn(8, D_MODEL), randn(D_MODEL)]
    for tensor in inputs:
        tensor.requires_grad_()

    def decode(values, w_dec, b_dec):
        return nested_decode(values, w_dec, b_dec, lists, bounds)

    assert torch.autograd.gradcheck(decode, inputs)


def test_gradients_of_plain_decoding():
    codes = SparseCodes.from_dense(dense_codes(6, 8))
    inputs = [codes.values.clone().requires_grad_(), randn(8, D_MODEL).requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(v, w, codes), inputs)


def test_gradients_of_encoding():
    x = randn(6, D_MODEL, seed=1)
    pattern = SparseCodes.from_dense(dense_codes(6, 8))

    def encode(w_enc, b_enc, b_dec):
        centred = x - b_dec
        pre = linear(centred, w_enc, b_enc)
        codes = pattern._replace(values=pre[pattern.tokens, pattern.features].detach())
        return active_values(centred, w_enc, b_enc, b_dec, FeatureLists(codes))

    inputs = [randn(8, D_MODEL, seed=2), randn(8, seed=3), randn(D_MODEL, seed=4)]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(encode, inputs)


def test_no_gradient_reaches_the_activations():
    x = randn(6, D_MODEL).requires_grad_()
    codes = SparseCodes.from_dense(dense_codes(6, 8))
    w_enc = randn(8, D_MODEL).requires_grad_()
    values = active_values(x, w_enc, randn(8), randn(D_MODEL), FeatureLists(codes))
    torch.autograd.backward(values.sum())
    assert x.grad is None
    assert w_enc.grad.abs().sum() > 0


def test_values_do_not_share_memory_with_the_codes():
    codes = SparseCodes.from_dense(dense_codes(6, 8))
    values = active_values(
        randn(6, D_MODEL), randn(8, D_MODEL), randn(8), randn(D_MODEL), FeatureLists(codes)
    )
    assert torch.equal(values, codes.values)
    assert values.data_ptr() != codes.values.data_ptr()


def test_codes_without_entries_are_decoded():
    codes = SparseCodes.from_dense(torch.zeros(3, 8, dtype=torch.float64))
    w_dec, b_dec = randn(8, D_MODEL).requires_grad_(), randn(D_MODEL).requires_grad_()
    values = active_values(
        randn(3, D_MODEL), randn(8, D_MODEL).requires_grad_(), randn(8), b_dec, FeatureLists(codes)
    )
    rebuilt = nested_decode(values, w_dec, b_dec, FeatureLists(codes), [2, 8])
    assert torch.equal(rebuilt, b_dec.expand(2, 3, D_MODEL))
    torch.autograd.backward(rebuilt.sum())
    assert torch.equal(w_dec.grad, torch.zeros_like(w_dec))
    assert torch.equal(b_dec.grad, torch.full((D_MODEL,), 6.0, dtype=torch.float64))


def test_gradients_are_equal_bit_for_bit_when_repeated():
    """Large enough for the CPU's atomic additions, whose order is not fixed."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(100_000, 8, generator=generator)
    codes = SparseCodes.from_dense(f)
    x = torch.randn(100_000, D_MODEL, generator=generator)

    def gradients():
        w_enc, w_dec, b_enc, b_dec = (
            t.float().requires_grad_()
            for t in (randn(8, D_MODEL), randn(8, D_MODEL, seed=1), randn(8), randn(D_MODEL))
        )
        lists = FeatureLists(codes)
        values = active_values(x, w_enc, b_enc, b_dec, lists)
        rebuilt = nested_decode(values, w_dec, b_dec, lists, [3, 8])
        torch.autograd.backward(rebuilt.square().sum())
        return [t.grad for t in (w_enc, w_dec, b_enc, b_dec)]

    first = gradients()
    for _ in range(3):
        assert all(map(torch.equal, first, gradients()))
