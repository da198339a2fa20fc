"""The back end for CPUs: functions compiled by numba, around one matrix product by torch."""

import itertools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from visae.saes.codes import SparseCodes
from visae.saes.kernels import gradients as compiled_gradients
from visae.saes.kernels.adam import adam_rows, step_factors
from visae.saes.kernels.compiled_codes import compiled_codes, compiled_largest
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
from visae.saes.kernels.threads import Buffers, even_ranges, over_ranges

__all__ = ["NumbaKernels"]

Array = NDArray[Any]

_TOKENS_PER_TASK = 64
_ROWS_PER_TASK = 256
_N_TASKS = 32


class NumbaKernels:
    """``Kernels`` for float32 weights in the memory of the CPU.

    Results do not depend on the number of threads. One object serves one training run at a time:
    it keeps the memory of its largest arrays from step to step.
    """

    def __init__(self, *, encode: Encode) -> None:
        self._encode = encode
        self._buffers = Buffers()

    @property
    def name(self) -> str:
        """``numba``."""
        return "numba"

    @property
    def encode(self) -> Encode:
        """Precision of the products that only choose features."""
        return self._encode

    def codes(
        self, centred: Float[Tensor, "token d_model"], weights: Weights, keep: Keep
    ) -> SparseCodes:
        """The codes of a batch."""
        return compiled_codes(
            centred.contiguous(), weights, keep, encode=self._encode, buffers=self._buffers
        )

    def keep_largest(
        self, pre: Float[Tensor, "token chosen"], k: int
    ) -> Float[Tensor, "token chosen"]:
        """The k largest of each row where they exceed zero, and zero elsewhere."""
        return compiled_largest(pre, k)

    def decode(self, batch: Batch, codes: SparseCodes, weights: Weights) -> Decoded:
        """Errors by every prefix, and the gradient by the entries."""
        (n_tokens, d_model), n_prefixes = batch.wanted.shape, len(batch.bounds)
        rows = self._buffers.take("rows", (n_tokens, n_prefixes, d_model))
        grad_values = torch.empty_like(codes.values)
        inputs = (
            *_arrays(batch.wanted.contiguous()),
            _arrays(codes.offsets, codes.features, codes.values),
            _arrays(weights.w_dec, weights.b_dec),
            (np.asarray(batch.bounds), np.float32(2 / rows.numel())),
            _arrays(rows, grad_values),
        )
        sums = over_ranges(
            lambda span: compiled_gradients.decode_tokens(span, *inputs),
            even_ranges(n_tokens, _TOKENS_PER_TASK),
        )
        losses = torch.from_numpy(np.sum(sums, axis=0) / (n_tokens * d_model)).float()
        return Decoded(losses, rows, grad_values)

    def row_gradients(
        self,
        batch: Batch,
        codes: SparseCodes,
        decoded: Decoded,
        *,
        weights: Weights,
        extra: ExtraRows | None = None,
    ) -> RowGradients:
        """Gradients of all parameters, in memory that the next call overwrites."""
        shape = weights.w_dec.shape
        grad_enc, grad_dec = (self._buffers.take(name, shape) for name in ("w_enc", "w_dec"))
        grad_bias, squares = torch.zeros(shape[0]), torch.zeros(shape[0])
        touched = torch.zeros(shape[0], dtype=torch.bool)
        lists = compiled_gradients.sort_by_feature(codes.features.numpy(), shape[0])
        inputs = (
            (*lists, *_arrays(codes.tokens, codes.values, decoded.grad_values)),
            _arrays(batch.centred.contiguous(), decoded.rows),
            (*_arrays(weights.w_dec), np.asarray(batch.bounds)),
            _extra_arrays(extra, shape),
            _arrays(grad_enc, grad_bias, grad_dec, touched, squares),
        )
        over_ranges(
            lambda span: compiled_gradients.gradient_rows(span, *inputs),
            _ranges_of_equal_work(lists[0]),
        )
        grad_b_dec = decoded.rows[:, 0].sum(0)
        if batch.subtracts_bias:
            grad_b_dec -= own_bias(grad_bias, extra) @ weights.w_enc
        norm = (squares.double().sum() + grad_b_dec.double().square().sum()).sqrt().float()
        return RowGradients(Weights(grad_enc, grad_bias, grad_dec, grad_b_dec), touched, norm)

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
        norm = float(gradients.norm)
        factors = tuple(step_factors(rate, state.n_steps, norm=norm, clip_norm=clip_norm))
        for name in Weights._fields:
            tensors = (
                getattr(each, name)
                for each in (weights, state.mean, state.square, gradients.weights)
            )
            *matrices, gradient = _arrays(*(t if t.ndim == 2 else t[None] for t in tensors))
            is_matrix = matrices[0].shape[0] > 1
            touched = gradients.touched.numpy() if is_matrix else np.ones(1, np.bool_)
            inputs = tuple(matrices), (gradient, touched), factors, name == "w_dec"
            over_ranges(
                lambda span, inputs=inputs: adam_rows(span, *inputs),  # type: ignore[misc]
                even_ranges(matrices[0].shape[0], _ROWS_PER_TASK),
            )


def _arrays(*tensors: Tensor) -> tuple[Array, ...]:
    """The tensors' own memory, as arrays."""
    return tuple(tensor.detach().numpy() for tensor in tensors)


def _extra_arrays(extra: ExtraRows | None, shape: torch.Size) -> tuple[Array, ...]:
    index = np.full(shape[0], -1, np.int64)
    if extra is None:
        nothing = np.zeros((1, shape[1]), np.float32)
        return index, nothing, np.zeros(1, np.float32), nothing
    index[extra.features.numpy()] = np.arange(extra.features.shape[0])
    return (index, *_arrays(extra.w_enc, extra.b_enc, extra.w_dec))


def _ranges_of_equal_work(starts: Array) -> list[tuple[int, int]]:
    """Ranges of features with about equally many entries, a feature itself counting as one."""
    work = starts + np.arange(starts.shape[0])
    cuts = np.searchsorted(work, np.linspace(0, work[-1], _N_TASKS + 1)[1:-1])
    edges = np.unique(np.concatenate([[0], cuts, [starts.shape[0] - 1]]))
    return [(int(start), int(stop)) for start, stop in itertools.pairwise(edges)]
