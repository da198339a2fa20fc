"""Triton's kernels, interpreted, against the plain back end; a GPU is not needed."""

import pytest
import torch

from visae.saes.kernels.interface import AdamState, Batch, ExtraRows, Keep, Kernels, Weights
from visae.saes.kernels.plain import TorchKernels

pytest.importorskip("triton")

N_TOKENS, N_FEATURES, D_MODEL = 4, 12, 5


@pytest.fixture(scope="module")
def triton_kernels():
    from visae.saes.kernels.triton_kernels import TritonKernels

    return TritonKernels(encode="bfloat16")


@pytest.fixture
def plain():
    return TorchKernels(encode="float32")


@pytest.fixture
def weights(weights_of):
    return weights_of(N_FEATURES, D_MODEL)


@pytest.fixture
def batch(weights, batch_of):
    return batch_of(weights, N_TOKENS, cuts=[2, 7])


def test_it_is_a_back_end(triton_kernels):
    assert isinstance(triton_kernels, Kernels)
    assert triton_kernels.name == "triton"


@pytest.mark.parametrize("over", ["token", "batch"])
def test_codes(triton_kernels, plain, weights, batch, over):
    found, wanted = (
        each.codes(batch.centred, weights, Keep(k=3, over=over)) for each in (triton_kernels, plain)
    )
    assert torch.equal(found.features, wanted.features)
    assert torch.equal(found.offsets, wanted.offsets)
    torch.testing.assert_close(found.values, wanted.values)


@pytest.mark.parametrize("subtracts_bias", [True, False])
@pytest.mark.parametrize("has_extra", [True, False])
def test_decoding_and_gradients(triton_kernels, plain, weights, batch, subtracts_bias, has_extra):
    batch = batch._replace(subtracts_bias=subtracts_bias)
    rows = torch.randn(2, 2, D_MODEL, generator=torch.Generator().manual_seed(0))
    extra = ExtraRows(torch.tensor([0, 11]), rows[0], torch.tensor([1.0, -2.0]), rows[1])
    codes = plain.codes(batch.centred, weights, Keep(k=3, over="batch"))
    results = []
    for each in (triton_kernels, plain):
        decoded = each.decode(batch, codes, weights)
        gradients = each.row_gradients(
            batch, codes, decoded, weights=weights, extra=extra if has_extra else None
        )
        results.append((*decoded, *gradients.weights, gradients.touched, gradients.norm))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_batch_without_entries(triton_kernels, plain, weights, batch):
    weights.b_enc.fill_(-1e4)
    codes = triton_kernels.codes(batch.centred, weights, Keep(k=3, over="token"))
    assert codes.values.numel() == 0
    found, wanted = (each.decode(batch, codes, weights) for each in (triton_kernels, plain))
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.rows, wanted.rows)


def test_the_largest_of_each_row(triton_kernels, plain):
    pre = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(triton_kernels.keep_largest(pre, 4), plain.keep_largest(pre, 4))


@pytest.mark.parametrize("clip_norm", [1e6, 0.01])
def test_updates(triton_kernels, plain, weights, batch, clip_norm):
    copies = [Weights(*(tensor.clone() for tensor in weights)) for _ in range(2)]
    states = [AdamState(*(Weights(*map(torch.zeros_like, weights)) for _ in "ms")) for _ in "tp"]
    for step in range(2):
        for each, own, state in zip((triton_kernels, plain), copies, states, strict=True):
            one = Batch(batch.wanted - own.b_dec, batch.wanted, batch.bounds)
            codes = plain.codes(one.centred, own, Keep(k=3, over="token"))
            gradients = plain.row_gradients(one, codes, plain.decode(one, codes, own), weights=own)
            each.update(own, gradients, state, rate=0.01 / (step + 1), clip_norm=clip_norm)
    for found, wanted in zip(*copies, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert states[0].n_steps == 2
