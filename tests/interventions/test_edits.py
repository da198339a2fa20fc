"""Edits: the equation against its long form, and what must stay untouched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ExperimentError
from visae.interventions.edits import Edit, apply_push, plan_push, scope_tokens
from visae.models.layout import Layout
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import BatchTopK, ReLU, TopK

LAYOUT = Layout(special=("cls", "register0"), grid=(2, 3))
EDITS = [
    Edit(feature=3, operation="ablate"),
    Edit(feature=3, operation="scale", value=2.5),
    Edit(feature=3, operation="scale", value=-1.0),
    Edit(feature=3, operation="set", value=1.75),
    Edit(feature=3, operation="add", value=0.5),
]


def make_sae(sparsity, *, seed=0, d_model=6, n_features=9):
    """A random SAE with a mean, a scale and decoder rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(SAEConfig(d_model=d_model, n_features=n_features, sparsity=sparsity))
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        sae.scale.fill_(1.7)
        sae.threshold.fill_(0.4)
    return sae.requires_grad_(False)


SAES = [make_sae(kind) for kind in (ReLU(l1=0.0), TopK(k=3), BatchTopK(k=3))]


def activations(n_images=4, *, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(n_images, LAYOUT.n_tokens, 6, generator=generator)


def edited(sae, x, edit, scope):
    """Activations after an edit, by the code under test."""
    allowed = scope_tokens(LAYOUT, scope)
    push = plan_push(sae, x, edit, allowed, active_only=scope == "active-patches")
    return apply_push(x, push.amounts, push.direction.reshape(1, 1, -1)), push


def naive(sae, x, edit, scope):
    """decode(f') + (x − decode(f)), token by token in float64."""
    result = x.double().clone()
    allowed = {
        "patches": range(2, 8),
        "active-patches": range(2, 8),
        "special": range(2),
        "all": range(8),
    }
    weights = sae.W_dec.double()
    for image in range(x.shape[0]):
        for token in allowed[scope]:
            f = sae.encode(x[image, token : token + 1])[0].double()
            if scope == "active-patches" and f[edit.feature] == 0:
                continue
            changed = f.clone()
            old = f[edit.feature]
            changed[edit.feature] = {
                "ablate": torch.zeros(()).double(),
                "scale": old * edit.value,
                "set": torch.tensor(edit.value).double(),
                "add": old + edit.value,
            }[edit.operation]

            def decode(code):
                return (code @ weights + sae.b_dec.double()) * sae.scale + sae.mean.double()

            result[image, token] = decode(changed) + (x[image, token].double() - decode(f))
    return result


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.config.sparsity.kind)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.operation} {edit.value:g}")
@pytest.mark.parametrize("scope", ["patches", "active-patches", "special", "all"])
def test_an_edit_is_the_decoded_edit_with_the_error_added_back(sae, edit, scope):
    x = activations()
    found, push = edited(sae, x, edit, scope)
    expected = naive(sae, x, edit, scope)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (push.amounts != 0).any()


@pytest.mark.parametrize("sae", SAES, ids=lambda sae: sae.config.sparsity.kind)
def test_tokens_outside_the_scope_or_without_a_change_stay_bit_for_bit(sae):
    x = activations()
    active = sae.encode(x.flatten(0, 1))[:, 3].reshape(x.shape[:2]) > 0
    assert active.any()
    assert not active.all()
    for scope, allowed in (("patches", slice(2, 8)), ("special", slice(2)), ("all", slice(8))):
        found, _ = edited(sae, x, EDITS[0], scope)
        changed = (found != x).any(dim=2)
        expected = torch.zeros_like(active)
        expected[:, allowed] = active[:, allowed]
        assert torch.equal(changed, expected)
    for same in (Edit(feature=3, operation="scale", value=1.0), Edit(feature=3, operation="add")):
        found, push = edited(sae, x, same, "all")
        assert torch.equal(found, x)
        assert not push.off_distribution.any()


def test_active_patches_leaves_silent_patches_alone():
    sae, x = SAES[0], activations()
    silent = sae.encode(x.flatten(0, 1))[:, 3].reshape(x.shape[:2]) == 0
    for edit in EDITS:
        found, _ = edited(sae, x, edit, "active-patches")
        assert torch.equal(found[silent], x[silent])
        assert torch.equal(found[:, :2], x[:, :2])
    found, _ = edited(sae, x, Edit(feature=3, operation="set", value=1.0), "patches")
    assert (found[:, 2:] != x[:, 2:]).any(dim=2).all()


def test_the_relative_norm_is_that_of_the_move():
    sae, x = SAES[2], activations()
    found, push = edited(sae, x, EDITS[0], "all")
    expected = (found.double() - x.double()).norm(dim=2) / x.double().norm(dim=2)
    assert torch.allclose(push.relative_norm.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(push.direction.norm()) == pytest.approx(1.0, abs=1e-6)


def test_a_control_moves_every_token_as_far_as_the_edit():
    """The same amounts along another unit vector: the same norm per token."""
    sae, x = SAES[2], activations()
    found, push = edited(sae, x, EDITS[1], "patches")
    for seed in range(5):
        other = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        other = (other / other.norm()).reshape(1, 1, -1)
        control = apply_push(x, push.amounts, other)
        lengths = [(moved.double() - x.double()).norm(dim=2) for moved in (found, control)]
        assert torch.allclose(*lengths, rtol=1e-5, atol=1e-5)


def test_one_direction_an_image():
    x, amounts = activations(2), torch.ones(2, LAYOUT.n_tokens)
    directions = torch.eye(6)[:2].unsqueeze(1)
    found = apply_push(x, amounts, directions)
    assert torch.equal(found - x != 0, directions.expand_as(x) != 0)


@pytest.mark.parametrize(
    ("operation", "value", "beyond"),
    [
        ("set", 2.0, False),  # twice the largest: still counted as seen
        ("set", 2.0001, True),
        ("set", -0.001, True),
        ("ablate", 0.0, False),
        ("scale", 0.5, False),
        ("scale", -0.5, True),
        ("add", 1.0, None),  # depends on the token
    ],
)
def test_off_distribution_is_beyond_twice_the_maximum_or_below_zero(operation, value, beyond):
    sae, x = SAES[0], activations()
    observed = 1.0 if operation == "set" else float(sae.encode(x.flatten(0, 1))[:, 3].max())
    edit = Edit(feature=3, operation=operation, value=value)
    push = plan_push(sae, x, edit, scope_tokens(LAYOUT, "all"), observed_max=observed)
    active = sae.encode(x.flatten(0, 1))[:, 3].reshape(x.shape[:2])
    target = edit.target(active)
    expected = ((target > 2 * observed) | (target < 0)) & (target != active)
    assert torch.equal(push.off_distribution, expected)
    if beyond is not None:
        assert bool(push.off_distribution.any()) == beyond


def test_without_an_observed_maximum_only_negative_targets_are_off():
    push = plan_push(
        SAES[0],
        activations(),
        Edit(feature=3, operation="set", value=1e6),
        scope_tokens(LAYOUT, "all"),
    )
    assert not push.off_distribution.any()


def test_scopes():
    names = {
        scope: scope_tokens(LAYOUT, scope).nonzero().flatten().tolist()
        for scope in ("patches", "active-patches", "special", "all")
    }
    assert names == {
        "patches": [2, 3, 4, 5, 6, 7],
        "active-patches": [2, 3, 4, 5, 6, 7],
        "special": [0, 1],
        "all": list(range(8)),
    }


def test_special_tokens_that_are_not_there():
    with pytest.raises(ExperimentError, match="no special tokens") as caught:
        scope_tokens(Layout(special=(), grid=(2, 2)), "special")
    assert "edit.scope = special" in str(caught.value)


@given(st.integers(0, 2**20), st.integers(0, 2))
def test_the_codes_of_other_features_do_not_enter_the_move(seed, kind):
    """Δx is parallel to one decoder row whatever else is active."""
    sae, x = SAES[kind], activations(1, seed=seed)
    found, _ = edited(sae, x, EDITS[3], "all")
    moves = (found - x).double().flatten(0, 1)
    row = sae.W_dec[3].double() / sae.W_dec[3].double().norm()
    across = moves - (moves @ row).unsqueeze(1) * row
    assert float(across.abs().max()) < 1e-4


@pytest.mark.parametrize("site", ["residual@0", "residual@1", "mlp@0", "attention@1", "norm"])
def test_a_splice_without_change_gives_the_original_output_bit_for_bit(planted_lab, site):
    model = planted_lab.model
    pixels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trace = model.trace(pixels, [site])
    x = trace.tokens[site]
    sae = make_sae(BatchTopK(k=3), d_model=16)
    allowed = scope_tokens(model.layout(site), "all")
    for edit in (Edit(feature=1, operation="scale", value=1.0), Edit(feature=1, operation="add")):
        push = plan_push(sae, x, edit, allowed)
        spliced = apply_push(x, push.amounts, push.direction.reshape(1, 1, -1))
        assert torch.equal(spliced, x)
        assert torch.equal(model.resume(trace, site, spliced).tokens, trace.output.tokens)
    push = plan_push(sae, x, Edit(feature=1, operation="add", value=3.0), allowed)
    moved = apply_push(x, push.amounts, push.direction.reshape(1, 1, -1))
    assert not torch.allclose(model.resume(trace, site, moved).tokens, trace.output.tokens)


def test_a_splice_keeps_the_models_own_logits(tiny_vit):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    trace = tiny_vit.trace(pixels, ["residual@1"])
    output = tiny_vit.resume(trace, "residual@1", trace.tokens["residual@1"])
    assert trace.output.logits is not None
    assert torch.equal(output.logits, trace.output.logits)


def test_a_feature_without_a_direction_changes_nothing():
    """A decoder row of zeros has no unit vector; what it would give must not reach the tokens."""
    sae, x = make_sae(ReLU(l1=0.0)), activations()
    with torch.no_grad():
        sae.W_dec[3] = 0.0
    found, push = edited(sae, x, EDITS[3], "all")
    assert torch.equal(found, x)
    assert not push.off_distribution.any()
