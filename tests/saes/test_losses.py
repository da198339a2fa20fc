import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.saes.config import SAEConfig
from visae.saes.losses import auxk_loss, batch_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

D_MODEL, N_FEATURES, N_TOKENS = 8, 32, 24
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
KINDS = [ReLU(l1=0.3), TopK(k=4), BatchTopK(k=4)]
PREFIXES = [(), (2, 6, 14, 32), (1, 32)]


def make_sae(sparsity, prefixes=(), seed=0):
    """An SAE in float64 with random parameters and decoder rows of any length."""
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=sparsity, prefixes=prefixes)
    sae = SAE(config).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        sae.mean.copy_(torch.randn(D_MODEL, generator=generator))
        sae.scale.fill_(1.7)
    return sae


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(N_TOKENS, D_MODEL, generator=generator) * 2 + 0.5


def some_dead(n, seed=0):
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[torch.randperm(N_FEATURES, generator=torch.Generator().manual_seed(seed))[:n]] = True
    return dead


class Naive(NamedTuple):
    total: torch.Tensor
    reconstruction: torch.Tensor
    auxk: torch.Tensor
    codes: torch.Tensor


def kept(p, sparsity):
    """Which pre-activations survive, by sorting."""
    if isinstance(sparsity, ReLU):
        return p > 0
    if isinstance(sparsity, TopK):
        return p >= p.sort(dim=1, descending=True).values[:, [sparsity.k - 1]]
    return p >= p.flatten().sort(descending=True).values[sparsity.k * p.shape[0] - 1]


def naive_loss(sae, x, dead, alpha):
    """Every formula of METHODS §1 to §3, dense, in float64."""
    x_normal = (x.double() - sae.mean) / sae.scale
    p = (x_normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    f = torch.relu(p) * kept(p.detach(), sae.config.sparsity)
    errors = [
        ((f[:, :m] @ sae.W_dec[:m] + sae.b_dec - x_normal) ** 2).sum(1).mean() / D_MODEL
        for m in sae.config.prefixes or (N_FEATURES,)
    ]
    l1 = getattr(sae.config.sparsity, "l1", 0.0)
    penalty = l1 * (f * sae.W_dec.norm(dim=1)).sum(1).mean()
    auxk = x_normal.new_zeros(())
    if dead.any():
        e = (x_normal - (f @ sae.W_dec + sae.b_dec)).detach()
        p_dead = (x_normal - sae.b_dec).detach() @ sae.W_enc.T + sae.b_enc
        p_dead = p_dead.masked_fill(~dead, -torch.inf)
        k_aux = min(D_MODEL // 2, int(dead.sum()))
        floor = p_dead.detach().sort(dim=1, descending=True).values[:, [k_aux - 1]]
        f_dead = torch.relu(p_dead) * (p_dead.detach() >= floor)
        rebuilt = f_dead @ sae.W_dec  # without b_dec
        auxk = alpha * ((rebuilt - e) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    return Naive(sum(errors) / len(errors) + penalty + auxk, errors[-1], auxk, f)


def gradients(sae, loss):
    sae.zero_grad()
    torch.autograd.backward(loss)
    return {name: getattr(sae, name).grad.clone() for name in NAMES}


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize("prefixes", PREFIXES, ids=str)
@pytest.mark.parametrize("n_dead", [0, 1, 3, 10, 32])
def test_loss_and_every_gradient_are_the_naive_ones(sparsity, prefixes, n_dead):
    sae, x, dead = make_sae(sparsity, prefixes), make_batch(), some_dead(n_dead)
    naive = naive_loss(sae, x, dead, alpha=0.4)
    expected = gradients(sae, naive.total)
    found = batch_loss(sae, x, dead, auxk_alpha=0.4)
    torch.testing.assert_close(found.total, naive.total)
    torch.testing.assert_close(found.reconstruction, naive.reconstruction)
    torch.testing.assert_close(found.auxk, naive.auxk)
    torch.testing.assert_close(found.codes.dense(), naive.codes)
    for name, gradient in gradients(sae, found.total).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().sum() > 0


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(0, 32))
@settings(max_examples=20)
def test_the_naive_gradients_hold_for_any_weights(seed, sparsity, n_dead):
    sae = make_sae(sparsity, (2, 6, 14, 32), seed)
    x, dead = make_batch(seed), some_dead(n_dead, seed)
    expected = gradients(sae, naive_loss(sae, x, dead, alpha=1 / 32).total)
    found = gradients(sae, batch_loss(sae, x, dead, auxk_alpha=1 / 32).total)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("sparsity", KINDS, ids=lambda kind: kind.kind)
def test_single_precision_is_close_to_double(sparsity):
    sae, x, dead = make_sae(sparsity, (2, 6, 14, 32)), make_batch(), some_dead(10)
    naive = naive_loss(sae, x, dead, alpha=0.4)
    expected = gradients(sae, naive.total)
    single = SAE(sae.config)
    single.load_state_dict(sae.state_dict())
    found = batch_loss(single, x, dead, auxk_alpha=0.4)
    assert float(found.total.detach()) == pytest.approx(float(naive.total.detach()), rel=1e-5)
    for name, gradient in gradients(single, found.total).items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-3, atol=1e-5)


def test_the_penalty_can_be_warmed_up():
    sae, x, dead = make_sae(ReLU(l1=0.3)), make_batch(), some_dead(0)
    whole, half, none = (
        float(batch_loss(sae, x, dead, auxk_alpha=0, penalty_share=share).total.detach())
        for share in (1.0, 0.5, 0.0)
    )
    assert none == pytest.approx(float(batch_loss(sae, x, dead, auxk_alpha=0).reconstruction))
    assert half == pytest.approx((whole + none) / 2)
    assert whole > none


def auxk_gradients(sae, x, dead):
    """Gradients of the dead features' loss alone."""
    centred = sae.normalise(x).double() - sae.b_dec
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    return gradients_or_none(sae, auxk_loss(sae, centred.detach(), residual, dead))


def gradients_or_none(sae, loss):
    sae.zero_grad()
    torch.autograd.backward(loss)
    return {name: getattr(sae, name).grad for name in NAMES}


@pytest.mark.parametrize("n_dead", [1, 5, 30])
def test_the_dead_features_loss_reaches_dead_rows_and_nothing_else(n_dead):
    sae, dead = make_sae(BatchTopK(k=4)), some_dead(n_dead)
    found = auxk_gradients(sae, make_batch(), dead)
    assert found["b_dec"] is None
    for name in ("W_enc", "b_enc", "W_dec"):
        per_feature = found[name].abs().reshape(N_FEATURES, -1).sum(1)
        assert (per_feature[~dead] == 0).all()
        assert (per_feature[dead] > 0).sum() >= min(n_dead, D_MODEL // 2)


def test_the_dead_features_loss_does_not_know_b_dec():
    sae, x, dead = make_sae(BatchTopK(k=4)), make_batch(), some_dead(5)
    centred, residual = sae.normalise(x), torch.ones_like(x).double() * x
    before = auxk_loss(sae, centred, residual, dead)
    with torch.no_grad():
        sae.b_dec += 100
    assert torch.equal(auxk_loss(sae, centred, residual, dead), before)


def test_features_alive_in_the_batch_but_counted_dead_get_both_gradients():
    sae, x = make_sae(TopK(k=4)), make_batch()
    alive = batch_loss(sae, x, some_dead(0), auxk_alpha=1.0)
    both = batch_loss(sae, x, some_dead(32), auxk_alpha=1.0)
    assert float((both.total - alive.total).detach()) == pytest.approx(float(both.auxk))


@pytest.mark.parametrize(
    "x", [torch.ones(1, D_MODEL), torch.ones(5, D_MODEL)], ids=["one", "equal"]
)
def test_a_residual_without_spread_gives_zero_and_finite_gradients(x):
    """‖e − ē‖² is 0: the quotient's value and its gradient would both be NaN."""
    sae, dead = make_sae(BatchTopK(k=4)), some_dead(10)
    loss = batch_loss(sae, x, dead, auxk_alpha=1.0)
    assert float(loss.auxk) == 0.0
    assert all(torch.isfinite(g).all() for g in gradients(sae, loss.total).values())


def test_a_batch_where_nothing_is_active_still_teaches_the_bias():
    sae = make_sae(BatchTopK(k=4), (2, 6, 14, 32))
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    x = make_batch()
    loss = batch_loss(sae, x, some_dead(0), auxk_alpha=1.0)
    assert loss.codes.values.numel() == 0
    found = gradients(sae, loss.total)
    residual = sae.b_dec.detach() - sae.normalise(x)
    torch.testing.assert_close(found["b_dec"], 2 * residual.mean(0) / D_MODEL)
    assert all((found[name] == 0).all() for name in ("W_enc", "b_enc", "W_dec"))


def test_every_prefix_is_the_reconstruction_of_a_smaller_sae():
    sae, x = make_sae(TopK(k=4), (2, 6, 14, 32)), make_batch()
    whole = batch_loss(sae, x, some_dead(0), auxk_alpha=0)
    f = whole.codes.dense()
    errors = [
        (sae.restore(f[:, :m] @ sae.W_dec[:m] + sae.b_dec) - x).square().mean() / sae.scale**2
        for m in (2, 6, 14, 32)
    ]
    torch.testing.assert_close(whole.total, sum(errors) / 4)
    torch.testing.assert_close(whole.reconstruction, errors[-1].detach())


def test_the_loss_does_not_change_the_sae():
    sae = make_sae(BatchTopK(k=4), (2, 32))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    torch.autograd.backward(batch_loss(sae, make_batch(), some_dead(5), auxk_alpha=1.0).total)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())


def test_normalisation_carries_the_loss_from_scale_to_scale():
    """Learning rates and λ mean the same for activations of any size and mean."""
    sae, x, dead = make_sae(ReLU(l1=0.3)), make_batch(), some_dead(5)
    scaled = SAE(dataclasses.replace(sae.config)).double()
    scaled.load_state_dict(sae.state_dict())
    with torch.no_grad():
        scaled.mean.mul_(1024).add_(512)
        scaled.scale.mul_(1024)
    plain = batch_loss(sae, x, dead, auxk_alpha=0.4)
    other = batch_loss(scaled, x * 1024 + 512, dead, auxk_alpha=0.4)
    torch.testing.assert_close(other.total, plain.total, rtol=1e-5, atol=0)
