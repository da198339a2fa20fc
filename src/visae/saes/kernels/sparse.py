"""Encode and decode through sparse codes, with gradients that cost O(active features).

Dense formulae, for tokens x and codes f with few non-zero entries:

    p = x W_encᵀ + b_enc        x̂ = f W_dec
    dW_dec = fᵀ g               df = g W_decᵀ at the active entries only
    dW_enc = dfᵀ x              db_enc = Σ df

The dense (token, feature) matrix appears only inside the selection, and is not kept.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visae.saes.codes import SparseCodes

__all__ = ["active_values", "sparse_decode"]


def active_values(
    inputs: Float[Tensor, "token d_model"],
    w_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    codes: SparseCodes,
) -> Float[Tensor, " entry"]:
    """The values of ``codes``, differentiable with respect to the encoder's weights.

    ``codes`` holds the pre-activations that a selection kept; no gradient reaches the inputs.
    """
    result: Tensor = _ActiveValues.apply(inputs, w_enc, b_enc, codes)
    return result


def sparse_decode(
    values: Float[Tensor, " entry"],
    w_dec: Float[Tensor, "feature d_model"],
    codes: SparseCodes,
) -> Float[Tensor, "token d_model"]:
    """Σ of values × decoder rows for each token; the pattern is that of ``codes``."""
    result: Tensor = _SparseDecode.apply(values, w_dec, codes.offsets, codes.features)
    return result


class _ActiveValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, w_enc: Tensor, _b_enc: Tensor, codes: SparseCodes
    ) -> Tensor:
        ctx.save_for_backward(inputs, codes.offsets, codes.features)
        ctx.n_features = w_enc.shape[0]
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, offsets, features = ctx.saved_tensors
        grad_weights = _sum_by_feature(inputs, grad, offsets, features, ctx.n_features)
        grad_bias = grad.new_zeros(ctx.n_features).index_add_(0, features, grad)
        return None, grad_weights, grad_bias, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, offsets: Tensor, features: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, w_dec, offsets, features)
        return _weighted_rows(w_dec, values, offsets, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, w_dec, offsets, features = ctx.saved_tensors
        grad_weights = _sum_by_feature(grad, values, offsets, features, w_dec.shape[0])
        return _row_products(grad, w_dec, offsets, features), grad_weights, None, None


def _weighted_rows(rows: Tensor, weights: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
    """For each bag of entries, the sum of weight × row; a bag is empty where offsets repeat."""
    return nn.functional.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _sum_by_feature(
    rows: Float[Tensor, "token d_model"],
    values: Float[Tensor, " entry"],
    offsets: Int64[Tensor, " token_plus_one"],
    features: Int64[Tensor, " entry"],
    n_features: int,
) -> Float[Tensor, "feature d_model"]:
    """For each feature, Σ value × row over its entries, read in feature-sorted order."""
    n_tokens = offsets.shape[0] - 1
    tokens = torch.arange(n_tokens, device=offsets.device).repeat_interleave(offsets.diff())
    order = torch.argsort(features, stable=True)
    counts = torch.bincount(features, minlength=n_features)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _weighted_rows(rows, values[order], starts, tokens[order])


def _row_products(
    grad: Float[Tensor, "token d_model"],
    rows: Float[Tensor, "feature d_model"],
    offsets: Int64[Tensor, " token_plus_one"],
    features: Int64[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """⟨grad of the entry's token, the entry's row⟩ for each entry, never gathering the rows."""
    weights = rows.new_ones(features.shape[0]).requires_grad_()
    with torch.enable_grad():
        sums = _weighted_rows(rows.detach(), weights, offsets, features)
    (products,) = torch.autograd.grad(sums, weights, grad)
    return products
