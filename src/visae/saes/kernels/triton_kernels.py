"""The back end for CUDA devices: Triton kernels around torch's matrix product and top-k."""

from typing import Any

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor

from visae.saes.codes import SparseCodes
from visae.saes.kernels import triton_rows
from visae.saes.kernels.adam import BETAS, EPSILON
from visae.saes.kernels.interface import (
    AdamState,
    Batch,
    Decoded,
    Encode,
    ExtraRows,
    Keep,
    RowGradients,
    Weights,
    own_bias,
)
from visae.saes.kernels.plain_codes import entry_groups, largest_of_rows, plain_codes, starts_of

__all__ = ["TritonKernels"]


class TritonKernels:
    """``Kernels`` for float32 weights in the memory of a CUDA device.

    A feature's gradients are summed by one program, in a fixed order, so that equal inputs give
    equal bits; a feature that fires for every token takes that program as long as it takes.
    """

    def __init__(self, *, encode: Encode) -> None:
        self._encode = encode

    @property
    def name(self) -> str:
        """``triton``."""
        return "triton"

    @property
    def encode(self) -> Encode:
        """Precision of the products that only choose features."""
        return self._encode

    def codes(
        self, centred: Float[Tensor, "token d_model"], weights: Weights, keep: Keep
    ) -> SparseCodes:
        """The codes of a batch."""
        return plain_codes(centred, weights, keep, encode=self._encode, products=_products)

    def keep_largest(
        self, pre: Float[Tensor, "token chosen"], k: int
    ) -> Float[Tensor, "token chosen"]:
        """The k largest of each row where they exceed zero, and zero elsewhere."""
        return largest_of_rows(pre, k)

    def decode(self, batch: Batch, codes: SparseCodes, weights: Weights) -> Decoded:
        """Errors by every prefix, and the gradient by the entries."""
        (n_tokens, d_model), n_prefixes = batch.wanted.shape, len(batch.bounds)
        rows = batch.wanted.new_empty(n_tokens, n_prefixes, d_model)
        squares = batch.wanted.new_empty(n_tokens, n_prefixes)
        grad_values = torch.empty_like(codes.values)
        starts = starts_of(entry_groups(batch, codes), n_tokens * n_prefixes)
        _launch(
            triton_rows.decode_token,
            n_tokens,
            (batch.wanted, starts, codes.features, codes.values, weights.w_dec, weights.b_dec),
            (rows, grad_values, squares, 2 / rows.numel(), n_prefixes, d_model),
        )
        return Decoded(squares.mean(0) / d_model, rows, grad_values)

    def row_gradients(
        self,
        batch: Batch,
        codes: SparseCodes,
        decoded: Decoded,
        *,
        weights: Weights,
        extra: ExtraRows | None = None,
    ) -> RowGradients:
        """Gradients of all parameters."""
        n_features, d_model = weights.w_dec.shape
        starts = starts_of(codes.features, n_features)
        w_enc, w_dec = torch.empty_like(weights.w_enc), torch.empty_like(weights.w_dec)
        b_enc, squares = torch.empty_like(weights.b_enc), torch.empty_like(weights.b_enc)
        index, *extra_rows = _extra(extra, weights)
        order = torch.argsort(codes.features, stable=True)
        entries = codes.tokens, entry_groups(batch, codes), codes.values, decoded.grad_values
        _launch(
            triton_rows.gradient_row,
            n_features,
            (starts, order, *entries, batch.centred, decoded.rows, weights.w_dec),
            (index, *extra_rows, w_enc, b_enc, w_dec, squares, d_model),
        )
        b_dec = decoded.rows[:, 0].sum(0)
        if batch.subtracts_bias:
            b_dec -= own_bias(b_enc, extra) @ weights.w_enc
        norm = (squares.double().sum() + b_dec.double().square().sum()).sqrt().float()
        touched = (starts.diff() > 0) | (index > 0)
        return RowGradients(Weights(w_enc, b_enc, w_dec, b_dec), touched, norm)

    def update(
        self,
        weights: Weights,
        gradients: RowGradients,
        state: AdamState,
        *,
        rate: float,
        clip_norm: float,
    ) -> None:
        """One Adam step, in place."""
        state.n_steps += 1
        clip = (clip_norm / (gradients.norm + 1e-6)).clamp(max=1.0)
        size = rate / (1 - BETAS[0] ** state.n_steps)
        root = (1 - BETAS[1] ** state.n_steps) ** 0.5
        for name in Weights._fields:
            tensors = [
                getattr(each, name)
                for each in (weights, gradients.weights, state.mean, state.square)
            ]
            width = tensors[0].shape[1] if tensors[0].ndim == 2 else 1
            _launch(
                triton_rows.adam_row,
                tensors[0].numel() // width,
                (*tensors, clip, size, root, *BETAS, EPSILON),
                (width, name == "w_dec"),
            )


def _launch(kernel: Any, n_programs: int, *arguments: tuple[Any, ...]) -> None:
    """Run a kernel whose last argument but constants is the width of the rows."""
    flat = [value for part in arguments for value in part]
    width = next(value for value in reversed(flat) if type(value) is int)
    if n_programs:
        kernel[(n_programs,)](*flat, BLOCK=triton.next_power_of_2(width))


def _products(
    rows: Tensor, row_index: Int64[Tensor, " entry"], others: Tensor, other_index: Tensor
) -> Float[Tensor, " entry"]:
    out = rows.new_empty(row_index.shape[0])
    inputs = rows, row_index, others, other_index, rows.shape[1]
    _launch(triton_rows.product, out.shape[0], (out, *inputs))
    return out


def _extra(extra: ExtraRows | None, weights: Weights) -> tuple[Tensor, ...]:
    """For each feature which extra row it has, and the rows; the first is zero, for all others."""
    index = torch.zeros_like(weights.b_enc, dtype=torch.int64)
    rows = [weights.b_dec.new_zeros(1, weights.b_dec.shape[0]) for _ in range(2)]
    bias = weights.b_dec.new_zeros(1)
    if extra is None:
        return index, rows[0], bias, rows[1]
    index[extra.features] = torch.arange(1, 1 + extra.features.shape[0], device=index.device)
    added = extra.w_enc, extra.w_dec
    enc, dec = (torch.cat(pair) for pair in zip(rows, added, strict=True))
    return index, enc, torch.cat([bias, extra.b_enc]), dec
