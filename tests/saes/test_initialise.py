import pytest
import torch

from visae.errors import StoreError
from visae.saes.config import SAEConfig
from visae.saes.initialise import initialise, random_rows
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

D_MODEL, N_FEATURES = 8, 40
KINDS = [ReLU(), TopK(k=4), BatchTopK(k=4)]


def sample(n_tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_tokens, D_MODEL, generator=generator) * 3 + 7


def initialised(sparsity=None, *, x=None, **options):
    x = sample() if x is None else x
    kind = sparsity or TopK(k=4)
    sae = SAE(SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=kind))
    sae.mean.copy_(x.mean(0))
    sae.scale.fill_(x.std())
    initialise(sae, x, **{"seed": 0, **options})
    return sae


@pytest.mark.parametrize("rows", ["mixed", "data", "random"])
def test_rows_are_unit_and_biases_zero(rows):
    sae = initialised(rows=rows)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    assert (sae.b_enc == 0).all()
    assert (sae.b_dec == 0).all()


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_encoder_rows_are_the_best_multiple_of_decoder_rows(sparsity):
    sae, x = initialised(sparsity), sample()
    ratio = (sae.W_enc / sae.W_dec).detach()
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    x_normal = sae.normalise(x)
    codes = sparsity.select(sae.pre_activations(x_normal).detach())
    rebuilt = codes.dense() @ sae.W_dec.detach()
    error = (rebuilt - x_normal).square().mean()
    for factor in (0.97, 1.03):
        assert (factor * rebuilt - x_normal).square().mean() > error


def test_encoder_and_decoder_share_no_memory():
    sae = initialised()
    before = sae.W_enc.clone()
    with torch.no_grad():
        sae.W_dec += 1
    assert torch.equal(sae.W_enc, before)


def test_rows_of_data_are_the_tokens_each_at_most_once():
    sae, x = initialised(rows="data"), sample()
    directions = torch.nn.functional.normalize(sae.normalise(x), dim=1)
    similarity = sae.W_dec.detach() @ directions.T
    best = similarity.max(dim=1)
    torch.testing.assert_close(best.values, torch.ones(N_FEATURES))
    assert len(best.indices.unique()) == N_FEATURES


def test_a_sample_smaller_than_the_dictionary_is_used_evenly():
    x = sample(15)
    sae = initialised(rows="data", x=x)
    directions = torch.nn.functional.normalize(sae.normalise(x), dim=1)
    counts = torch.bincount((sae.W_dec.detach() @ directions.T).argmax(dim=1), minlength=15)
    assert counts.min() == N_FEATURES // 15
    assert counts.max() == -(-N_FEATURES // 15)


def test_mixed_rows_lean_on_the_data():
    sae, x = initialised(), sample()
    directions = torch.nn.functional.normalize(sae.normalise(x), dim=1)
    best = (sae.W_dec.detach() @ directions.T).max(dim=1).values
    assert (best > 0.85).all()
    assert (best < 0.9999).all()


def test_one_seed_gives_one_start():
    first, second, other = initialised(), initialised(), initialised(seed=1)
    assert torch.equal(first.W_enc, second.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    initialised()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_holds_no_numbers_is_refused(value):
    x = sample()
    x[3, 2] = value
    with pytest.raises(StoreError, match="NaN or infinite"):
        initialised(x=x)


def test_random_rows_are_unit_and_spread_evenly():
    rows = random_rows(4000, D_MODEL, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000))
    covariance = rows.T @ rows / 4000
    torch.testing.assert_close(covariance, torch.eye(D_MODEL) / D_MODEL, atol=0.02, rtol=0)
