"""A transcoder: reads one site, gives another, with a mean and scale for each (2406.11944)."""

import pytest
import torch

from visae.errors import ConfigError
from visae.saes.config import SAEConfig
from visae.saes.initialise import initialise
from visae.saes.learned import Gated, JumpReLU
from visae.saes.losses import batch_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

D_MODEL, N_FEATURES, N_TOKENS = 8, 32, 40
KINDS = [ReLU(l1=0.3), TopK(k=4), BatchTopK(k=4), JumpReLU(target_l0=4), Gated(l1=0.1)]
NO_DEAD = torch.zeros(N_FEATURES, dtype=torch.bool)


def make_transcoder(sparsity, seed=0, **changes):
    """A transcoder in float64 with random parameters, its two sites far apart in size."""
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(
        d_model=D_MODEL, n_features=N_FEATURES, sparsity=sparsity, transcoder=True, **changes
    )
    sae = SAE(config).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        sae.mean.copy_(torch.randn(D_MODEL, generator=generator))
        sae.scale.fill_(1.7)
        sae.target_mean.copy_(torch.randn(D_MODEL, generator=generator) * 100)
        sae.target_scale.fill_(35.0)
        sae.threshold.fill_(0.4)
    return sae


def make_batch(seed=0):
    """Activations at the two sites."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(N_TOKENS, D_MODEL, generator=generator) * 2 + 0.5
    return x, torch.randn(N_TOKENS, D_MODEL, generator=generator) * 40 + 70


def naive(sae, x):
    """p = W_enc x' + b_enc, without b_dec, which belongs to the target; ŷ in both units."""
    p = ((x.double() - sae.mean) / sae.scale) @ sae.W_enc.T + sae.b_enc
    if isinstance(sae.config.sparsity, TopK):
        f = p.relu() * (p >= p.sort(1, descending=True).values[:, [sae.config.sparsity.k - 1]])
    else:
        f = p.relu()
    return f, f @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("sparsity", [ReLU(l1=0.0), TopK(k=4)], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("prefixes", [(), (2, 6, 14, 32)], ids=str)
def test_loss_and_every_gradient_are_the_naive_ones(sparsity, prefixes):
    sae, (x, y) = make_transcoder(sparsity, prefixes=prefixes), make_batch()
    f, _ = naive(sae, x)
    wanted = (y.double() - sae.target_mean) / sae.target_scale
    errors = [
        (f[:, :m] @ sae.W_dec[:m] + sae.b_dec - wanted).square().mean()
        for m in prefixes or (N_FEATURES,)
    ]
    torch.autograd.backward(sum(errors) / len(errors))
    expected = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    found = batch_loss(sae, x, NO_DEAD, auxk_alpha=1.0, target=y)
    torch.autograd.backward(found.total)
    torch.testing.assert_close(found.total, sum(errors) / len(errors))
    torch.testing.assert_close(found.reconstruction, errors[-1].detach())
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(k=4)], ids=lambda kind: kind.kind)
def test_inference_is_the_formula(sparsity):
    sae, (x, _) = make_transcoder(sparsity), make_batch()
    f, given = naive(sae, x)
    torch.testing.assert_close(sae.encode(x), f.detach())
    expected = (given * sae.target_scale + sae.target_mean).detach()
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(f.detach()), expected)
    torch.testing.assert_close(sae.feature_activations(x, [3, 9]), f[:, [3, 9]].detach())


def test_the_target_has_its_own_normalisation():
    sae, (x, y) = make_transcoder(TopK(k=4)), make_batch()
    torch.testing.assert_close(sae.restore(sae.normalise_target(y)), y.double())
    assert not torch.allclose(sae.restore(sae.normalise(x)), x.double())
    plain = SAE(SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=TopK(k=4)))
    assert torch.equal(plain.normalise_target(x), plain.normalise(x))
    assert "target_mean" not in plain.state_dict()


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_the_dead_features_learn_from_the_target(sparsity):
    sae, (x, y), dead = make_transcoder(sparsity), make_batch(), torch.arange(N_FEATURES) < 10
    loss = batch_loss(sae, x, dead, auxk_alpha=1.0, target=y)
    e = sae.normalise_target(y) - sae.normalise_target(
        sae.restore(loss.codes.dense() @ sae.W_dec + sae.b_dec)
    )
    p = (sae.normalise(x) @ sae.W_enc.T + sae.b_enc)[:, :10]
    kept = p.relu() * (p >= p.sort(1, descending=True).values[:, [3]])
    expected = (kept @ sae.W_dec[:10] - e).square().sum() / (e - e.mean(0)).square().sum()
    torch.testing.assert_close(loss.auxk, expected.detach())


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_rows_start_as_the_two_sides_of_one_token(sparsity):
    """The first step of learning is made: what an input row sees, its output row gives."""
    sae = SAE(make_transcoder(sparsity).config)
    x, y = make_batch()
    sae.mean.copy_(x.mean(0))
    sae.scale.fill_(x.std())
    sae.target_mean.copy_(y.mean(0))
    sae.target_scale.fill_(y.std())
    initialise(sae, x, target=y, seed=0, rows="data")
    inputs, outputs = (
        torch.nn.functional.normalize(t, dim=1) for t in (sae.normalise(x), sae.normalise_target(y))
    )
    seen = (torch.nn.functional.normalize(sae.W_enc, dim=1) @ inputs.T).argmax(1)
    given = (sae.W_dec @ outputs.T).argmax(1)
    assert torch.equal(seen, given)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    tensors = [*sae.parameters(), *sae.buffers()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_a_transcoder_without_a_target_is_refused():
    x, y = make_batch()
    with pytest.raises(ConfigError, match="two sites"):
        batch_loss(make_transcoder(TopK(k=4)), x, NO_DEAD, auxk_alpha=0)
    plain = SAE(SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=TopK(k=4)))
    with pytest.raises(ConfigError, match="no target"):
        batch_loss(plain, x, NO_DEAD, auxk_alpha=0, target=y)
