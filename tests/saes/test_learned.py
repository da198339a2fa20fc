import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from visae.errors import ConfigError
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.learned import Gated, JumpReLU, LearnedSparsity, learned_codes
from visae.saes.losses import batch_loss
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, Sparsity

D_MODEL, N_FEATURES, N_TOKENS = 8, 32, 40
PREFIXES = [(), (2, 6, 14, 32)]
JUMP = JumpReLU(target_l0=5, l0_weight=0.3, bandwidth=0.5)
JUMP_FREE = JumpReLU(target_l0=None, l0_weight=0.02, bandwidth=0.5)
GATED = Gated(l1=0.3)
KINDS = {"jumprelu": JUMP, "jumprelu, no target": JUMP_FREE, "gated": GATED}
NUMBERS = st.floats(-10, 10, width=32) | st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])
PRE = arrays("float32", array_shapes(min_dims=2, max_dims=2, max_side=9), elements=NUMBERS).map(
    torch.from_numpy
)


def make_sae(sparsity, prefixes=(), seed=0):
    """An SAE in float64 with random parameters, learned ones included."""
    generator = torch.Generator().manual_seed(seed)
    config = SAEConfig(d_model=D_MODEL, n_features=N_FEATURES, sparsity=sparsity, prefixes=prefixes)
    sae = SAE(config).double()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            if name == "learned.threshold":
                parameter.abs_().add_(0.1)
        sae.mean.copy_(torch.randn(D_MODEL, generator=generator))
        sae.scale.fill_(1.7)
    return sae


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(N_TOKENS, D_MODEL, generator=generator) * 2 + 0.5


NO_DEAD = torch.zeros(N_FEATURES, dtype=torch.bool)


def gradients(sae, loss):
    sae.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in sae.named_parameters()}


# The formulae, written densely


def nested_errors(sae, f, w_dec, b_dec, x_normal):
    prefixes = sae.config.prefixes or (N_FEATURES,)
    errors = [((f[:, :m] @ w_dec[:m] + b_dec - x_normal) ** 2).mean() for m in prefixes]
    return sum(errors) / len(errors)


def naive_gated(sae, x):
    """2404.16014, eq. 6 to 8: two paths with shared weights."""
    x_normal = (x.double() - sae.mean) / sae.scale
    gate = (x_normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    w_magnitude = sae.learned["log_gain"].exp()[:, None] * sae.W_enc
    magnitude = (x_normal - sae.b_dec) @ w_magnitude.T + sae.learned["magnitude_bias"]
    f = (gate > 0) * magnitude.relu()
    l1 = sae.config.sparsity.l1 * (gate.relu() * sae.W_dec.norm(dim=1)).sum(1).mean()
    frozen = sae.W_dec.detach(), sae.b_dec.detach()
    auxiliary = nested_errors(sae, gate.relu(), *frozen, x_normal)
    return f, nested_errors(sae, f, sae.W_dec, sae.b_dec, x_normal) + l1 + auxiliary


def naive_jumprelu(sae, x):
    """2407.14435: the value, and the gradients of eq. 11 and 12 written out."""
    sparsity, theta = sae.config.sparsity, sae.learned["threshold"]
    x_normal = (x.double() - sae.mean) / sae.scale
    p = (x_normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    f = p * (p > theta)
    rebuilt_loss = nested_errors(sae, f, sae.W_dec, sae.b_dec, x_normal)
    (to_f,) = torch.autograd.grad(rebuilt_loss, f, retain_graph=True)
    window = ((p - theta).abs() < sparsity.bandwidth / 2).double() / sparsity.bandwidth
    l0 = (p > theta).double().sum(1).mean()
    if sparsity.target_l0 is None:
        penalty, to_l0 = sparsity.l0_weight * l0, sparsity.l0_weight
    else:
        excess = l0 / sparsity.target_l0 - 1
        penalty = sparsity.l0_weight * excess**2
        to_l0 = sparsity.l0_weight * 2 * excess / sparsity.target_l0
    to_theta = -(to_f * theta * window).sum(0) - to_l0 * window.sum(0) / N_TOKENS
    return f, rebuilt_loss, penalty, to_theta


@pytest.mark.parametrize("prefixes", PREFIXES, ids=str)
def test_gated_is_the_formula_with_every_gradient(prefixes):
    sae, x = make_sae(GATED, prefixes), make_batch()
    codes, naive = naive_gated(sae, x)
    expected = gradients(sae, naive)
    found = batch_loss(sae, x, NO_DEAD, auxk_alpha=1.0)
    torch.testing.assert_close(found.total, naive)
    torch.testing.assert_close(found.codes.dense(), codes)
    for name, gradient in gradients(sae, found.total).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("sparsity", [JUMP, JUMP_FREE], ids=["target", "free"])
@pytest.mark.parametrize("prefixes", PREFIXES, ids=str)
def test_jumprelu_is_the_formula_with_every_gradient(sparsity, prefixes):
    sae, x = make_sae(sparsity, prefixes), make_batch()
    codes, rebuilt_loss, penalty, to_theta = naive_jumprelu(sae, x)
    sae.zero_grad()
    torch.autograd.backward(rebuilt_loss)  # the penalty's gradient reaches θ alone
    expected = {name: p.grad for name, p in sae.named_parameters()}
    expected = {n: g.clone() for n, g in expected.items() if g is not None}
    expected["learned.threshold"] = to_theta.detach()
    found = batch_loss(sae, x, NO_DEAD, auxk_alpha=1.0)
    torch.testing.assert_close(found.total, rebuilt_loss + penalty)
    torch.testing.assert_close(found.codes.dense(), codes)
    for name, gradient in gradients(sae, found.total).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().sum() > 0


def test_the_smooth_parts_pass_gradcheck():
    """Away from jumps, autograd agrees with finite differences."""
    generator = torch.Generator().manual_seed(0)
    pre = torch.rand(20, generator=generator, dtype=torch.float64) + 1.0
    names = ("log_gain", "magnitude_bias", "b_enc")
    own = [torch.rand(20, generator=generator, dtype=torch.float64) * 0.3 for _ in names]
    tensors = [t.requires_grad_() for t in (pre, *own)]
    assert torch.autograd.gradcheck(
        lambda p, *v: GATED.activate(p, dict(zip(names, v, strict=True))), tensors
    )
    theta = torch.rand(20, generator=generator, dtype=torch.float64) * 0.5
    assert torch.autograd.gradcheck(lambda p: JUMP.activate(p, {"threshold": theta}), [pre])


@pytest.mark.parametrize("bandwidth", [0.05, 0.5])
def test_the_straight_through_gradient_is_the_rectangle(bandwidth):
    kind = dataclasses.replace(JUMP_FREE, bandwidth=bandwidth)
    pre = torch.linspace(-1, 2, 301, dtype=torch.float64)
    theta = torch.full_like(pre, 0.5).requires_grad_()
    upstream = torch.linspace(1, 3, 301, dtype=torch.float64)
    values = kind.activate(pre, {"threshold": theta})
    (found,) = torch.autograd.grad(values, theta, upstream)
    inside = ((pre - 0.5).abs() < bandwidth / 2).double()
    torch.testing.assert_close(found, -upstream * 0.5 / bandwidth * inside)
    (of_l0,) = torch.autograd.grad(kind.penalty(pre, {"threshold": theta}, pre, 10), theta)
    torch.testing.assert_close(of_l0, -0.02 / 10 / bandwidth * inside)
    assert 0 < inside.sum() < 301


# Properties


@given(st.sampled_from(list(KINDS)), PRE, st.integers(0, 10**6))
def test_feature_activations_are_never_negative(name, pre, seed):
    """Whatever the learned numbers are, thresholds below zero included."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(seed)
    names = (*kind.vectors, "b_enc")
    vectors = {n: torch.randn(pre.shape[1], generator=generator) for n in names}
    entries = kind.candidates(pre, vectors)
    own = {n: v[entries.features] for n, v in vectors.items()}
    values = kind.activate(entries.values, own)
    codes = learned_codes(entries, values)
    assert (values >= 0).all()
    assert (codes.values > 0).all()
    assert (codes.n_tokens, codes.n_features) == pre.shape
    if isinstance(kind, JumpReLU):
        expected = torch.where(pre > vectors["threshold"].clamp_min(0), pre, 0)
        assert torch.equal(codes.dense(), expected)


@given(st.sampled_from(list(KINDS)), st.integers(0, 10**6), st.floats(-30, 30))
@settings(max_examples=20)
def test_prefixes_are_smaller_saes_that_share_b_dec(name, seed, shift):
    """A prefix uses only its own features, and b_dec once."""
    sae, x = make_sae(KINDS[name], (2, 6, 14, 32), seed), make_batch(seed) + shift
    nested = batch_loss(sae, x, NO_DEAD, auxk_alpha=0)
    f, wanted = nested.codes.dense(), sae.normalise(x)
    errors = [
        (f[:, :m] @ sae.W_dec[:m] + sae.b_dec - wanted).square().mean() for m in (2, 6, 14, 32)
    ]
    rest = batch_loss(SAE(sae.config).double(), x, NO_DEAD, auxk_alpha=0)
    assert rest.codes.values.numel() == 0
    torch.testing.assert_close(nested.reconstruction, errors[-1].detach())
    if isinstance(KINDS[name], JumpReLU):
        penalty = naive_jumprelu(sae, x)[2]
        torch.testing.assert_close(nested.total, sum(errors) / 4 + penalty)


@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_a_batch_where_nothing_is_active_still_teaches(sparsity):
    sae, x = make_sae(sparsity), make_batch()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    loss = batch_loss(sae, x, NO_DEAD, auxk_alpha=1.0)
    assert loss.codes.values.numel() == 0
    found = gradients(sae, loss.total)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert found["b_dec"].abs().sum() > 0


@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_the_dead_features_loss_reaches_dead_rows_and_nothing_else(sparsity):
    sae, x, dead = make_sae(sparsity), make_batch(), torch.arange(N_FEATURES) % 3 == 0
    without = gradients(sae, batch_loss(sae, x, NO_DEAD, auxk_alpha=1.0).total)
    with_dead = gradients(sae, batch_loss(sae, x, dead, auxk_alpha=1.0).total)
    assert torch.equal(without["b_dec"], with_dead["b_dec"])
    for name in ("W_enc", "b_enc", "W_dec"):
        change = (with_dead[name] - without[name]).abs().reshape(N_FEATURES, -1).sum(1)
        assert (change[~dead] == 0).all()
        assert (change[dead] > 0).sum() >= 4


@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_the_penalty_can_be_warmed_up(sparsity):
    sae, x = make_sae(sparsity), make_batch()
    whole, half, none = (
        batch_loss(sae, x, NO_DEAD, auxk_alpha=0, penalty_share=share).total.detach()
        for share in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half, (whole + none) / 2)
    assert whole > none


# In the SAE


@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_encoding_is_the_rule_of_training(sparsity):
    sae, x = make_sae(sparsity), make_batch()
    trained_on = batch_loss(sae, x, NO_DEAD, auxk_alpha=0).codes.dense()
    torch.testing.assert_close(sae.encode(x), trained_on)
    columns = sae.feature_activations(x, [7, 0, 7])
    torch.testing.assert_close(columns, trained_on[:, [7, 0, 7]])
    assert 0 < (trained_on > 0).double().mean() < 0.8


def test_learned_numbers_are_parameters_in_single_precision():
    for kind, names in ((JumpReLU(), ["threshold"]), (Gated(), ["log_gain", "magnitude_bias"])):
        sae = SAE(SAEConfig(d_model=4, n_features=8, sparsity=kind))
        assert [n for n, _ in sae.learned.named_parameters()] == names
        assert all(p.dtype == torch.float32 and p.shape == (8,) for p in sae.learned.values())
        tensors = [*sae.parameters(), *sae.buffers()]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert not SAE(SAEConfig(d_model=4, n_features=64, sparsity=BatchTopK())).learned


def test_gated_starts_as_a_relu():
    sae = SAE(SAEConfig(d_model=4, n_features=8, sparsity=Gated()))
    pre = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.select(pre).dense(), pre.relu())


@pytest.mark.parametrize("target", [1, 2.5, 20])
def test_calibration_starts_at_the_target(target):
    pre = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) + 2.0
    kind = JumpReLU(target_l0=target)
    theta = kind.calibrate(pre)["threshold"]
    assert float((pre > theta).sum()) == pytest.approx(target * 50, abs=1)
    assert JumpReLU(target_l0=30.0).calibrate(-pre.abs()) == {"threshold": 0.0}
    assert JumpReLU(target_l0=None).calibrate(pre) == {}
    assert kind.calibrate(torch.zeros(0, 30)) == {}


@pytest.mark.parametrize("sparsity", KINDS.values(), ids=KINDS)
def test_what_each_kind_says_of_itself(sparsity):
    assert isinstance(sparsity, LearnedSparsity)
    assert not isinstance(sparsity, Sparsity)
    assert not sparsity.uses_threshold
    assert not sparsity.compares_features
    assert not isinstance(BatchTopK(), LearnedSparsity)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (JumpReLU, {"target_l0": 0}),
        (JumpReLU, {"target_l0": float("nan")}),
        (JumpReLU, {"l0_weight": -1}),
        (JumpReLU, {"bandwidth": 0}),
        (JumpReLU, {"threshold_start": -0.1}),
        (Gated, {"l1": -0.1}),
    ],
)
def test_impossible_settings_are_refused(kind, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        kind(**setting)


def test_codes_drop_candidates_that_are_not_active():
    entries = SparseCodes.from_dense(torch.tensor([[1.0, 0, 2], [0, 0, 0], [3, 4, 0]]))
    codes = learned_codes(entries, torch.tensor([0.0, 5.0, 6.0, 0.0]))
    assert torch.equal(codes.dense(), torch.tensor([[0.0, 0, 5], [0, 0, 0], [6, 0, 0]]))
