"""Every back end against the formulae of ``interface.py``, written naively in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.saes.codes import SparseCodes
from visae.saes.kernels.interface import AdamState, ExtraRows, Keep, Kernels, RowGradients, Weights

SHAPES = {
    "n_tokens": st.integers(1, 9),
    "n_features": st.integers(1, 150),
    "d_model": st.integers(1, 20),
    "k": st.integers(1, 20),
    "seed": st.integers(0, 99),
}
CUTS = st.sets(st.integers(1, 100), max_size=3)


def double(weights):
    return Weights(*(tensor.double() for tensor in weights))


def pre_activations(batch, weights):
    return batch.centred.double() @ weights.w_enc.double().T + weights.b_enc.double()


def naive_codes(pre, keep):
    """The k largest of each row, or the k·B largest of all, above zero."""
    flat = pre if keep.over == "token" else pre.flatten()[None]
    count = min(keep.k, pre.shape[1]) * (1 if keep.over == "token" else pre.shape[0])
    kept = flat.topk(count, dim=1)
    return torch.zeros_like(flat).scatter(1, kept.indices, kept.values.relu()).view_as(pre)


def assert_same_but_for_ties(codes, pre, keep):
    """The same values, and the same set unless two pre-activations are equal to rounding."""
    wanted, found = naive_codes(pre, keep), codes.dense().double()
    scale = float(pre.abs().max())
    torch.testing.assert_close(found.sum(), wanted.sum(), rtol=1e-5, atol=1e-5 * scale)
    differ = (found > 0) != (wanted > 0)
    least = wanted[wanted > 0].min() if keep.over == "batch" else torch.tensor(0.0)
    for token in torch.nonzero(differ.any(1)).flatten():
        if keep.over == "token":
            least = wanted[token][wanted[token] > 0].min()
        assert (pre[token, differ[token]] - least).abs().max() < 1e-5 * scale
    torch.testing.assert_close(found[~differ], wanted[~differ], rtol=1e-5, atol=1e-5 * scale)


def test_a_back_end_is_one(kernels):
    assert isinstance(kernels, Kernels)


@pytest.mark.parametrize("over", ["token", "batch"])
@settings(max_examples=40)
@given(**SHAPES)
def test_codes_are_the_largest(
    kernels, weights_of, batch_of, over, n_tokens, n_features, d_model, k, seed
):
    weights = weights_of(n_features, d_model, seed)
    batch, keep = batch_of(weights, n_tokens), Keep(k=k, over=over)
    codes = kernels.codes(batch.centred, weights, keep)
    assert_same_but_for_ties(codes, pre_activations(batch, weights), keep)
    assert codes.offsets[0] == 0
    assert codes.offsets[-1] == codes.features.shape[0]
    assert codes.n_features == n_features
    inside = codes.tokens.diff() == 0
    assert (codes.features.diff()[inside] > 0).all()
    assert (codes.values > 0).all()


@pytest.mark.parametrize("over", ["token", "batch"])
def test_codes_are_the_largest_of_many(kernels, weights_of, batch_of, over):
    """Several chunks and blocks, and a sample of tokens that is not the batch."""
    weights = weights_of(3000, 40)
    batch, keep = batch_of(weights, 300), Keep(k=8, over=over)
    batch.wanted[1:250] = 0.01 * batch.wanted[1:250]
    batch = batch._replace(centred=batch.wanted - weights.b_dec)
    codes = kernels.codes(batch.centred, weights, keep)
    assert_same_but_for_ties(codes, pre_activations(batch, weights), keep)


@pytest.mark.parametrize("over", ["token", "batch"])
def test_a_threshold_guessed_too_high_is_found_out(kernels, over):
    """The tokens that a sample looks at hold all that is large; the others hold the rest."""
    weights = Weights(torch.eye(130), torch.zeros(130), torch.eye(130), torch.zeros(130))
    tokens = torch.rand(640, 130, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.1
    tokens[::10] += 5
    keep = Keep(k=20, over=over)
    codes = kernels.codes(tokens, weights, keep)
    assert codes.values.shape[0] == 12_800
    assert_same_but_for_ties(codes, tokens.double(), keep)


@pytest.mark.parametrize("over", ["token", "batch"])
def test_equal_values_are_kept_up_to_the_number(kernels, over):
    weights = Weights(torch.ones(200, 4), torch.zeros(200), torch.ones(200, 4), torch.zeros(4))
    codes = kernels.codes(torch.ones(6, 4), weights, Keep(k=7, over=over))
    assert codes.values.tolist() == [4.0] * 42
    if over == "token":
        assert codes.counts.tolist() == [7] * 6


@pytest.mark.parametrize("over", ["token", "batch"])
def test_nothing_above_zero_gives_no_codes(kernels, weights_of, batch_of, over):
    weights = weights_of(100, 6)
    weights.b_enc.fill_(-1e4)
    codes = kernels.codes(batch_of(weights, 5).centred, weights, Keep(k=3, over=over))
    assert codes.values.numel() == 0
    assert codes.offsets.tolist() == [0] * 6


def test_values_that_bfloat16_cannot_tell_apart_are_told_apart(back_end):
    """Features in pairs whose pre-activations differ by less than bfloat16's unit."""
    generator = torch.Generator().manual_seed(0)
    w_enc = torch.randn(64, 32, generator=generator).repeat_interleave(2, 0)
    w_enc[1::2] *= 1 + 1e-4
    weights = Weights(w_enc, torch.zeros(128), w_enc, torch.zeros(32))
    tokens = torch.randn(200, 32, generator=generator)
    codes = back_end(encode="bfloat16").codes(tokens, weights, Keep(k=5, over="token"))
    wanted = (tokens.double() @ w_enc.double().T).topk(5, dim=1)
    assert torch.equal(codes.features.view(200, 5), wanted.indices.sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40)
@given(n_tokens=st.integers(1, 5), width=st.integers(1, 70), k=st.integers(1, 80))
def test_the_largest_of_each_row_are_kept(kernels, dtype, n_tokens, width, k):
    pre = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(k)).to(dtype)
    kept = kernels.keep_largest(pre, k)
    wanted = naive_codes(pre.double(), Keep(k=k, over="token"))
    assert kept.dtype == dtype
    assert torch.equal(kept.double().sort(dim=1).values, wanted.sort(dim=1).values)
    assert torch.equal(kept[kept > 0], pre[kept > 0])


def naive_loss(weights, batch, pattern):
    """Loss of a batch, differentiable, for codes with a fixed pattern of active features."""
    centred = batch.wanted - weights.b_dec if batch.subtracts_bias else batch.centred
    f = (centred @ weights.w_enc.T + weights.b_enc) * pattern
    errors = [f[:, :m] @ weights.w_dec[:m] + weights.b_dec - batch.wanted for m in batch.bounds]
    return torch.stack([error.square().mean() for error in errors])


@pytest.mark.parametrize("subtracts_bias", [True, False])
@settings(max_examples=30)
@given(**SHAPES, cuts=CUTS)
def test_gradients_are_those_of_autograd(
    kernels, weights_of, batch_of, subtracts_bias, n_tokens, n_features, d_model, k, seed, cuts
):
    weights = weights_of(n_features, d_model, seed)
    batch = batch_of(weights, n_tokens, cuts)._replace(subtracts_bias=subtracts_bias)
    codes = kernels.codes(batch.centred, weights, Keep(k=k, over="batch"))
    decoded = kernels.decode(batch, codes, weights)
    gradients = kernels.row_gradients(batch, codes, decoded, weights=weights)

    leaves = Weights(*(tensor.double().requires_grad_() for tensor in weights))
    exact = batch._replace(centred=batch.centred.double(), wanted=batch.wanted.double())
    losses = naive_loss(leaves, exact, codes.dense() > 0)
    torch.autograd.backward(losses.mean())
    torch.testing.assert_close(decoded.losses.double(), losses.detach(), rtol=1e-4, atol=1e-6)
    assert_gradients(gradients, Weights(*(leaf.grad for leaf in leaves)), weights)


def assert_gradients(gradients, wanted, weights):
    scale = 1e-5 * max(float(gradient.abs().max()) for gradient in wanted)
    rows = weights.w_dec.double()
    across = wanted.w_dec - (wanted.w_dec * rows).sum(1, keepdim=True) * rows
    wanted = wanted._replace(w_dec=across)
    touched = gradients.touched
    for name in ("w_enc", "w_dec", "b_enc"):
        exact = getattr(wanted, name)
        assert not exact[~touched].any()
        found = getattr(gradients.weights, name)[touched].double()
        torch.testing.assert_close(found, exact[touched], rtol=1e-4, atol=scale)
    found = gradients.weights.b_dec.double()
    torch.testing.assert_close(found, wanted.b_dec, rtol=1e-4, atol=10 * scale)
    norm = torch.stack([gradient.norm() for gradient in wanted]).norm()
    torch.testing.assert_close(gradients.norm.double(), norm, rtol=1e-4, atol=100 * scale)


def test_extra_rows_are_added_and_reach_no_b_dec(kernels, weights_of, batch_of):
    weights = weights_of(40, 6)
    batch = batch_of(weights, 5, cuts=[10])
    codes = kernels.codes(batch.centred, weights, Keep(k=2, over="token"))
    decoded = kernels.decode(batch, codes, weights)
    alone = kernels.row_gradients(batch, codes, decoded, weights=weights)
    alone = RowGradients(Weights(*(t.clone() for t in alone.weights)), *alone[1:])
    extra = ExtraRows(
        torch.tensor([0, 3, 39]), torch.randn(3, 6), torch.randn(3), torch.randn(3, 6)
    )
    both = kernels.row_gradients(batch, codes, decoded, weights=weights, extra=extra)
    rows = weights.w_dec[extra.features]
    across = extra.w_dec - (extra.w_dec * rows).sum(1, keepdim=True) * rows
    wanted = {"w_enc": extra.w_enc, "b_enc": extra.b_enc, "w_dec": across}
    assert both.touched[extra.features].all()
    for name, added in wanted.items():
        before = getattr(alone.weights, name) * alone.touched.view(-1, *[1] * (added.ndim - 1))
        found = getattr(both.weights, name)[extra.features]
        torch.testing.assert_close(found, before[extra.features] + added, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.weights.b_dec, alone.weights.b_dec)


def test_codes_without_entries_give_the_bias_and_its_gradient(kernels, weights_of, batch_of):
    weights = weights_of(12, 4)
    batch = batch_of(weights, 3, cuts=[5])
    nothing = SparseCodes.from_dense(torch.zeros(3, 12))
    decoded = kernels.decode(batch, nothing, weights)
    gradients = kernels.row_gradients(batch, nothing, decoded, weights=weights)
    error = weights.b_dec - batch.wanted
    torch.testing.assert_close(decoded.losses, error.square().mean().expand(2))
    torch.testing.assert_close(gradients.weights.b_dec, 2 * error.sum(0) / error.numel())
    assert not gradients.touched.any()


@pytest.mark.parametrize("clip_norm", [1e6, 0.01])
def test_updates_are_those_of_adam(kernels, weights_of, clip_norm):
    weights = weights_of(30, 5)
    plain = [torch.nn.Parameter(tensor.clone()) for tensor in weights]
    adam = torch.optim.Adam(plain, lr=1.0, eps=6.25e-10)
    state = AdamState(*(Weights(*map(torch.zeros_like, weights)) for _ in range(2)))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        touched = torch.rand(30, generator=generator) < 0.5
        gradients = Weights(*(torch.randn(t.shape, generator=generator) for t in weights))
        for gradient in gradients[:3]:
            gradient[~touched] = 0
        rate = 0.01 / (step + 1)
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain, clip_norm)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            plain[2].div_(plain[2].norm(dim=1, keepdim=True))
        kernels.update(
            weights, RowGradients(gradients, touched, norm), state, rate=rate, clip_norm=clip_norm
        )
    for found, wanted in zip(weights, plain, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    for index, parameter in enumerate(plain):
        kept = adam.state[parameter]
        torch.testing.assert_close(state.mean[index], kept["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.square[index], kept["exp_avg_sq"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_repeated_step_gives_equal_bits(back_end, weights_of, batch_of, n_threads):
    threads = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    weights = weights_of(700, 24)
    batch = batch_of(weights, 500, cuts=[100])
    results = []
    for _ in range(3):
        kernels = back_end(encode="bfloat16")
        codes = kernels.codes(batch.centred, weights, Keep(k=9, over="batch"))
        decoded = kernels.decode(batch, codes, weights)
        gradients = kernels.row_gradients(batch, codes, decoded, weights=weights)
        rows = [t[gradients.touched] for t in gradients.weights[:3]]
        results.append([codes.features, codes.values, *rows, gradients.weights.b_dec])
    torch.set_num_threads(threads)
    for repeated in results[1:]:
        assert all(map(torch.equal, results[0], repeated))
