import pytest
import torch

from visae.evaluation.baselines import baseline
from visae.evaluation.metrics import measure
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

KINDS = ("untrained", "random-activations")


def sae_of(sparsity) -> SAE:
    return SAE(SAEConfig(d_model=12, n_features=40, sparsity=sparsity))


def made(kind, planted, sparsity, l0, seed=0) -> SAE:
    return baseline(kind, sae_of(sparsity), planted.tokens, l0=l0, n_tokens=8192, seed=seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [ReLU(), BatchTopK(k=3)])
@pytest.mark.parametrize("l0", [2.25, 7.0])
def test_the_l0_asked_for_is_met(planted, kind, sparsity, l0):
    control = made(kind, planted, sparsity, l0)
    none = torch.zeros(planted.store.n_images, dtype=torch.bool)
    found = measure(control, planted.tokens, images=none)
    assert found.mean_l0 == pytest.approx(l0, rel=0.01)
    assert control.n_features == 40


@pytest.mark.parametrize("kind", KINDS)
def test_topk_keeps_its_k(planted, kind):
    control = made(kind, planted, TopK(k=4), 3.6)
    assert control.config.sparsity == TopK(k=4)
    codes = control.encode_sparse(planted.activations[0])
    assert codes.counts.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_unit_and_the_encoder_is_a_multiple_of_them(planted, kind):
    control = made(kind, planted, ReLU(), 3.0)
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(40))
    factor = control.W_enc.norm(dim=1)
    torch.testing.assert_close(factor, factor[:1].expand(40))
    torch.testing.assert_close(control.W_enc, control.W_dec * factor[0])
    assert not control.b_enc.any()
    assert not control.b_dec.any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_multiple_of_the_codes_rebuilds_better(planted, kind):
    control = made(kind, planted, ReLU(), 3.0)
    x = planted.activations.flatten(0, 1)
    rebuilt, target = control.normalise(control(x)), control.normalise(x)
    best = (rebuilt * target).sum() / rebuilt.square().sum()
    assert float(best) == pytest.approx(1, abs=1e-3)


def test_rows_of_random_activations_are_different_activations(planted):
    control = made("random-activations", planted, ReLU(), 3.0)
    x = torch.nn.functional.normalize(control.normalise(planted.activations.flatten(0, 1)), dim=1)
    nearest = (control.W_dec @ x.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(40))
    assert len(set(nearest.indices.tolist())) == 40


def test_a_store_of_fewer_tokens_than_features_repeats_them(make_store):
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    from visae.evaluation.tokens import EvaluatedTokens

    tokens = EvaluatedTokens(make_store(x), "residual@1", "patches")
    control = baseline("random-activations", sae_of(ReLU()), tokens, l0=2, n_tokens=8192, seed=0)
    assert torch.isfinite(control.W_dec).all()
    assert len(control.W_dec.unique(dim=0)) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_dictionary(planted, kind):
    first, second, other = (made(kind, planted, ReLU(), 3.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.W_dec, second.W_dec)
    assert torch.equal(first.threshold, second.threshold)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_an_sae_that_is_never_active_has_a_baseline_that_is_never_active(planted):
    control = made("untrained", planted, ReLU(), 0.0)
    assert control.encode_sparse(planted.activations[0]).values.numel() == 0
    assert torch.isfinite(control(planted.activations[0])).all()
