import copy
import dataclasses
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.errors import CheckpointError
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

D_MODEL, N_FEATURES = 6, 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtLeast:
    """A user's own kind: keeps what reaches a fixed floor."""

    kind: Literal["at-least"] = "at-least"
    floor: float = 0.5
    uses_threshold = False
    compares_features = False

    def select(self, pre):
        return SparseCodes.from_dense(torch.where(pre >= self.floor, pre, 0))

    def penalty(self, values, norms, n_tokens):
        return values.new_zeros(())


KINDS = [ReLU(), TopK(k=3), BatchTopK(k=3), AtLeast()]


def make_sae(sparsity, *, threshold=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=sparsity))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        sae.mean.copy_(torch.randn(D_MODEL, generator=generator) * 3)
        sae.scale.fill_(2.5)
        sae.threshold.fill_(threshold)
    return sae


def batch(n_tokens=30, seed=0):
    return torch.randn(n_tokens, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 4


def naive_codes(sae, x):
    """METHODS §1 and §2 at inference, in float64."""
    w_enc, b_enc, b_dec, mean = (t.double() for t in (sae.W_enc, sae.b_enc, sae.b_dec, sae.mean))
    p = ((x.double() - mean) / sae.scale.double() - b_dec) @ w_enc.T + b_enc
    sparsity = sae.config.sparsity
    if isinstance(sparsity, TopK):
        return torch.where(p >= p.sort(1, descending=True).values[:, [sparsity.k - 1]], p, 0).relu()
    floor = {"relu": 0.0, "batch-topk": float(sae.threshold), "at-least": 0.5}[sparsity.kind]
    return torch.where(p > floor, p, 0)


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_encoding_is_the_formula(sparsity):
    sae, x = make_sae(sparsity), batch()
    expected = naive_codes(sae, x)
    torch.testing.assert_close(sae.encode(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.encode_sparse(x).dense(), sae.encode(x))
    assert 0 < (expected > 0).float().mean() < 0.8


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_decoding_is_the_formula(sparsity):
    sae, x = make_sae(sparsity), batch()
    f = sae.encode(x)
    expected = sae.scale * (f @ sae.W_dec + sae.b_dec) + sae.mean
    torch.testing.assert_close(sae.decode(f), expected)
    torch.testing.assert_close(sae.decode_sparse(sae.encode_sparse(x)), expected)
    torch.testing.assert_close(sae(x), expected)


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.floats(-50, 50), st.floats(0.01, 50))
@settings(max_examples=25)
def test_feature_activations_are_never_negative(sparsity, seed, shift, size):
    f = make_sae(sparsity, seed=seed).encode(batch(seed=seed) * size + shift)
    assert (f >= 0).all()
    if isinstance(sparsity, TopK):
        assert ((f > 0).sum(1) <= 3).all()


def test_normalising_and_restoring_are_inverse():
    sae, x = make_sae(ReLU()), batch()
    torch.testing.assert_close(sae.restore(sae.normalise(x)), x)
    torch.testing.assert_close(sae.normalise(x), (x - sae.mean) / 2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_of_any_precision_are_encoded_in_single(dtype):
    sae, x = make_sae(ReLU()), batch().to(dtype)
    assert torch.equal(sae.encode(x), sae.encode(x.float()))


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("features", [[7], [3, 0, 19], [5, 5], []])
def test_a_few_features_are_those_columns(sparsity, features):
    sae, x = make_sae(sparsity), batch()
    found = sae.feature_activations(x, features)
    torch.testing.assert_close(found, sae.encode(x)[:, features])
    assert found.shape == (30, len(features))


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_no_tokens_have_no_codes(sparsity):
    sae, none = make_sae(sparsity), batch(0)
    assert sae.encode(none).shape == (0, N_FEATURES)
    assert sae(none).shape == (0, D_MODEL)
    assert sae.encode_sparse(none).offsets.tolist() == [0]
    assert sae.feature_activations(none, [1, 2]).shape == (0, 2)


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("chunk", [1, 7 * N_FEATURES, 30 * N_FEATURES])
def test_chunks_do_not_change_the_codes(sparsity, chunk, monkeypatch):
    sae, x = make_sae(sparsity), batch()
    whole = sae.encode(x)
    monkeypatch.setattr("visae.saes.sae._CHUNK_ELEMENTS", chunk)
    torch.testing.assert_close(sae.encode(x), whole)


def test_a_threshold_that_was_never_set_is_refused():
    sae, x = make_sae(BatchTopK(k=3), threshold=-1.0), batch()
    for encode in (sae.encode, sae, lambda x: sae.feature_activations(x, [0])):
        with pytest.raises(CheckpointError, match=r"no threshold yet \(sparsity batch-topk\)"):
            encode(x)


def test_an_extreme_threshold_leaves_nothing_active():
    sae = make_sae(BatchTopK(k=3), threshold=1e9)
    assert sae.encode_sparse(batch()).values.numel() == 0
    torch.testing.assert_close(sae(batch()), (sae.scale * sae.b_dec + sae.mean).expand(30, -1))


def test_inference_makes_no_graph():
    sae, x = make_sae(ReLU()), batch()
    assert not sae.encode(x).requires_grad
    assert not sae(x).requires_grad
    assert not sae.decode(sae.encode(x)).requires_grad
    assert not sae.feature_activations(x, [1]).requires_grad


def test_parameters_share_no_memory():
    sae = make_sae(ReLU())
    tensors = [*sae.parameters(), *sae.buffers()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_enc += 1
    assert not torch.equal(other.W_enc, sae.W_enc)
    assert torch.equal(other.W_dec, sae.W_dec)
