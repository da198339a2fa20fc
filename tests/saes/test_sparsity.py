import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from visae.errors import ConfigError
from visae.saes.sparsity import BatchTopK, ReLU, Sparsity, TopK

NUMBERS = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 0.25, 0.5, 0.5000001, 1.0, 3.0]) | st.floats(
    -10, 10, width=32
)
PRE = arrays("float32", array_shapes(min_dims=2, max_dims=2, max_side=9), elements=NUMBERS).map(
    torch.from_numpy
)
KINDS = st.one_of(
    st.builds(ReLU),
    st.builds(TopK, k=st.integers(1, 9)),
    st.builds(BatchTopK, k=st.integers(1, 9)),
)


def check_is_a_choice_of(codes, pre):
    """Entries are positive pre-activations at their own places, each once, token by token."""
    assert (codes.n_tokens, codes.n_features) == pre.shape
    assert (codes.values > 0).all()
    assert torch.equal(codes.values, pre[codes.tokens, codes.features])
    places = codes.tokens * pre.shape[1] + codes.features
    assert len(places.unique()) == len(places)


@given(KINDS, PRE)
def test_feature_activations_are_never_negative(sparsity, pre):
    codes = sparsity.select(pre)
    check_is_a_choice_of(codes, pre)
    assert (codes.dense() >= 0).all()


@given(PRE)
def test_relu_keeps_what_is_positive(pre):
    assert torch.equal(ReLU().select(pre).dense(), pre.relu())


@given(PRE, st.integers(1, 12))
def test_topk_keeps_the_largest_of_each_token(pre, k):
    codes = TopK(k=k).select(pre)
    naive = pre.sort(dim=1, descending=True).values[:, :k].relu()
    for token, kept in enumerate(codes.dense()):
        assert torch.equal(kept.sort(descending=True).values[:k], naive[token])
    assert (codes.counts <= k).all()


@given(PRE, st.integers(1, 12))
def test_batch_topk_keeps_the_largest_of_the_batch(pre, k):
    kept = BatchTopK(k=k).select(pre).values.sort(descending=True).values
    naive = pre.flatten().sort(descending=True).values[: k * pre.shape[0]]
    assert torch.equal(kept, naive[naive > 0])


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_batch_topk_of_larger_batches(n_tokens, k):
    pre = torch.randn(n_tokens, 40, generator=torch.Generator().manual_seed(n_tokens))
    kept = BatchTopK(k=k).select(pre).values.sort(descending=True).values
    naive = pre.flatten().sort(descending=True).values[: k * n_tokens]
    assert torch.equal(kept, naive[naive > 0])


def test_batch_topk_is_exact_where_the_sample_misleads():
    """The tokens that judge the filter are the only ones with large values."""
    pre = torch.rand(640, 10, generator=torch.Generator().manual_seed(0))
    pre[::10] += 100
    codes = BatchTopK(k=3).select(pre)
    naive = pre.flatten().sort(descending=True).values[: 3 * 640]
    assert torch.equal(codes.values.sort(descending=True).values, naive)


def test_batch_topk_breaks_ties_to_the_exact_count():
    codes = BatchTopK(k=2).select(torch.ones(7, 9))
    assert codes.values.numel() == 14


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(k=2), BatchTopK(k=2)])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_batch_without_a_positive_value_has_no_entries(sparsity, value):
    codes = sparsity.select(torch.full((5, 8), value))
    assert codes.values.numel() == 0
    assert codes.offsets.tolist() == [0] * 6


@pytest.mark.parametrize("sparsity", [ReLU(), TopK(k=2), BatchTopK(k=2)])
def test_a_batch_without_tokens_has_no_entries(sparsity):
    codes = sparsity.select(torch.zeros(0, 8))
    assert (codes.n_tokens, codes.n_features) == (0, 8)


@pytest.mark.parametrize("sparsity", [TopK(k=20), BatchTopK(k=20)])
def test_k_beyond_the_features_keeps_them_all(sparsity):
    pre = torch.rand(4, 8) + 0.1
    assert torch.equal(sparsity.select(pre).dense(), pre)


def test_the_l1_penalty_is_the_mean_over_tokens():
    values, norms = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0])
    assert float(ReLU(l1=0.1).penalty(values, norms, 4)) == pytest.approx(0.1 * 8 / 4)


@pytest.mark.parametrize("sparsity", [TopK(), BatchTopK()])
def test_topk_kinds_have_no_penalty(sparsity):
    assert float(sparsity.penalty(torch.ones(3), torch.ones(3), 4)) == 0.0


@pytest.mark.parametrize(
    ("sparsity", "uses_threshold", "compares"),
    [(ReLU(), False, False), (TopK(), False, True), (BatchTopK(), True, False)],
)
def test_what_each_kind_says_of_itself(sparsity, uses_threshold, compares):
    assert isinstance(sparsity, Sparsity)
    assert sparsity.uses_threshold == uses_threshold
    assert sparsity.compares_features == compares


@pytest.mark.parametrize(
    ("kind", "setting"), [(ReLU, {"l1": -0.1}), (TopK, {"k": 0}), (BatchTopK, {"k": -3})]
)
def test_impossible_settings_are_refused(kind, setting):
    (name, value) = next(iter(setting.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        kind(**setting)
