"""Encode and decode through sparse codes, with gradients that cost O(active features).

Dense formulae, for tokens x' and codes f with few non-zero entries, over nested prefixes of the
features that end at n_1 < n_2 < … :

    p = W_enc (x' − b_dec) + b_enc       x̂'_m = Σ_{i < n_m} f_i W_dec,i + b_dec
    dW_dec = fᵀ g      df = g W_decᵀ     dW_enc = dfᵀ (x' − b_dec)      db_enc = Σ df

with df at the active entries only, and b_dec gradients through both. The dense (token, feature)
matrix appears only inside the selection, and is not kept. On the CPU every sum has a fixed order,
so equal inputs give equal bits.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visae.saes.codes import SparseCodes

__all__ = ["FeatureLists", "active_values", "nested_decode", "sparse_decode"]


class FeatureLists:
    """The entries of codes listed feature by feature: sorted once, used by every gradient."""

    def __init__(self, codes: SparseCodes) -> None:
        self.codes = codes

    @functools.cached_property
    def tokens(self) -> Int64[Tensor, " entry"]:
        """Token of each entry."""
        return self.codes.tokens

    @functools.cached_property
    def _order(self) -> Int64[Tensor, " entry"]:
        """The entries sorted by feature, those of one feature by token."""
        return torch.argsort(self.codes.features.int(), stable=True)

    @functools.cached_property
    def _offsets(self) -> Int64[Tensor, " feature_plus_one"]:
        return _offsets(self.codes.features, self.codes.n_features)

    def sum_rows(
        self,
        rows: Float[Tensor, "row d_model"],
        row_of_entry: Int64[Tensor, " entry"],
        weights: Float[Tensor, " entry"],
    ) -> Float[Tensor, "feature d_model"]:
        """For each feature, Σ weight × row over its entries."""
        order = self._order
        return _weighted_rows(rows, weights[order], self._offsets, row_of_entry[order])


def active_values(
    centred: Float[Tensor, "token d_model"],
    w_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    b_dec: Float[Tensor, " d_model"],
    lists: FeatureLists,
) -> Float[Tensor, " entry"]:
    """The values of codes, differentiable with respect to the encoder's weights and b_dec.

    ``centred`` is x' − b_dec, and the codes are the pre-activations of it that a selection kept;
    no gradient reaches x'.
    """
    result: Tensor = _ActiveValues.apply(centred.detach(), w_enc, b_enc, b_dec, lists)
    return result


def nested_decode(
    values: Float[Tensor, " entry"],
    w_dec: Float[Tensor, "feature d_model"],
    b_dec: Float[Tensor, " d_model"],
    lists: FeatureLists,
    bounds: Sequence[int],
) -> Float[Tensor, "prefix token d_model"]:
    """The reconstruction by each prefix of the features, all with b_dec, from one pass.

    ``bounds`` are where the prefixes end, ascending, the last being the number of features.
    """
    result: Tensor = _NestedDecode.apply(values, w_dec, b_dec, lists, tuple(bounds))
    return result


def sparse_decode(
    values: Float[Tensor, " entry"],
    w_dec: Float[Tensor, "feature d_model"],
    codes: SparseCodes,
) -> Float[Tensor, "token d_model"]:
    """Σ of values × decoder rows for each token; the pattern is that of ``codes``."""
    if not torch.is_grad_enabled():
        return _weighted_rows(w_dec, values, codes.offsets, codes.features)
    no_bias = w_dec.new_zeros(w_dec.shape[1])
    return nested_decode(values, w_dec, no_bias, FeatureLists(codes), [codes.n_features])[0]


class _ActiveValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, centred: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, lists: FeatureLists
    ) -> Tensor:
        ctx.save_for_backward(centred, w_enc)
        ctx.lists = lists
        return lists.codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, w_enc = ctx.saved_tensors
        features = ctx.lists.codes.features
        grad_rows = ctx.lists.sum_rows(centred, ctx.lists.tokens, grad)
        grad_bias = grad.new_zeros(w_enc.shape[0]).index_add_(0, features, grad)
        return None, grad_rows, grad_bias, -(grad_bias @ w_enc), None


class _NestedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        lists: FeatureLists,
        bounds: tuple[int, ...],
    ) -> Tensor:
        groups = _group_entries(lists, bounds)
        with torch.enable_grad():  # a graph of its own, for the gradient of the values alone
            weights = values.detach()[groups.order].requires_grad_()
            parts = _weighted_rows(w_dec.detach(), weights, groups.offsets, groups.features)
        ctx.save_for_backward(values)
        ctx.lists, ctx.groups, ctx.weights, ctx.parts = lists, groups, weights, parts
        sums = parts.detach().view(len(bounds), -1, w_dec.shape[1])
        sums[0] += b_dec
        for m in range(1, len(bounds)):
            sums[m] += sums[m - 1]
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        grad = grad.clone()
        for m in reversed(range(grad.shape[0] - 1)):  # group m is in every prefix from m on
            grad[m] += grad[m + 1]
        rows = grad.flatten(0, 1)
        grad_rows = ctx.lists.sum_rows(rows, ctx.groups.row_of_entry, values)
        (products,) = torch.autograd.grad(ctx.parts, ctx.weights, rows, retain_graph=True)
        grad_values = torch.empty_like(values)
        grad_values[ctx.groups.order] = products
        return grad_values, grad_rows, grad[0].sum(0), None, None


class _Groups(NamedTuple):
    """Entries by group of features (what one prefix adds to the one before), then by token."""

    order: Int64[Tensor, " entry"]
    """The entries, group after group."""
    features: Int64[Tensor, " entry"]
    """Feature of each entry, in that order."""
    offsets: Int64[Tensor, " row_plus_one"]
    """Where the entries of each row (group, token) start, in that order."""
    row_of_entry: Int64[Tensor, " entry"]
    """Row of each entry, in the order of the codes: group · n_tokens + token."""


def _group_entries(lists: FeatureLists, bounds: tuple[int, ...]) -> _Groups:
    features, n_tokens = lists.codes.features, lists.codes.n_tokens
    starts = torch.tensor(bounds[:-1], device=features.device)
    group = torch.bucketize(features, starts, right=True)
    order = torch.cat([torch.nonzero(group == m).flatten() for m in range(len(bounds))])
    rows = group * n_tokens + lists.tokens
    return _Groups(order, features[order], _offsets(rows, len(bounds) * n_tokens), rows)


def _offsets(index: Int64[Tensor, " entry"], n_bags: int) -> Int64[Tensor, " bag_plus_one"]:
    """Where each bag starts when entries are sorted by their bag, and the number of entries."""
    counts = torch.bincount(index, minlength=n_bags)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _weighted_rows(rows: Tensor, weights: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
    """For each bag of entries, the sum of weight × row; a bag is empty where offsets repeat."""
    return nn.functional.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
