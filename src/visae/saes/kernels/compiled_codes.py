"""Codes of a batch on the CPU: a matrix product a chunk of tokens, and what is large in it.

Pre-activations exist for one chunk at a time, in bfloat16 where that is the faster product, and
are gone once their largest have been taken by ``saes/kernels/selection.py``.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from visae.saes.codes import SparseCodes
from visae.saes.kernels import selection
from visae.saes.kernels.interface import Encode, Keep, Weights
from visae.saes.kernels.rounding import round_rows
from visae.saes.kernels.threads import Buffers, Range, even_ranges, over_ranges

__all__ = ["compiled_codes", "compiled_largest"]

Array = NDArray[Any]

_CHUNK_ELEMENTS = 2**24
_TOKENS_PER_TASK = 64
_ENTRIES_PER_TASK = 4096
_GUESS_TOKENS = 64
_LARGEST_BLOCK = 64
_UNIT = 2.0**-24  # of float32


def compiled_codes(
    centred: Float[Tensor, "token d_model"],
    weights: Weights,
    keep: Keep,
    *,
    encode: Encode,
    buffers: Buffers,
) -> SparseCodes:
    """The codes that ``Kernels.codes`` promises, with the product in a precision of choice."""
    encoder = _encoder(centred, weights, encode)
    k = min(keep.k, encoder.n_features)
    take = _of_each_token if keep.over == "token" else _of_batch
    return take(encoder, k, buffers)


def compiled_largest(pre: Float[Tensor, "token chosen"], k: int) -> Float[Tensor, "token chosen"]:
    """The k largest of each row, float32 or bfloat16, above zero, and zero elsewhere."""
    bits, _ = _bits(pre.contiguous())
    kept = torch.zeros_like(pre)
    over_ranges(
        lambda span: selection.copy_largest(span, k, bits, _bits(kept)[0]),
        even_ranges(pre.shape[0], _TOKENS_PER_TASK),
    )
    return kept


class _Encoder(NamedTuple):
    """Both factors of the product, and what the compiled functions need beside it."""

    rows: Tensor
    """Tokens, as multiplied."""
    matrix: Tensor
    """Encoder rows, as multiplied."""
    bias: Tensor
    """Encoder biases, as added."""
    exact: tuple[Array, Array, Array]
    """Tokens, encoder rows and biases in float32."""
    margins: tuple[tuple[Array, ...], tuple[Any, ...]]
    """Norm and rounding of each token; of each feature besides that of its bias, the largest of
    each, and the product's own."""

    @property
    def n_tokens(self) -> int:
        return self.rows.shape[0]

    @property
    def n_features(self) -> int:
        return self.matrix.shape[0]


class _Entries(NamedTuple):
    """What may be among the largest of a batch, token by token."""

    tokens: Array
    """Token of each entry."""
    features: Array
    """Feature of each entry."""
    values: Array
    """Value of each entry, to within its margin."""
    margins: Array
    """How far the value may be off."""


def _encoder(centred: Tensor, weights: Weights, encode: Encode) -> _Encoder:
    w_enc, b_enc = weights.w_enc, weights.b_enc
    exact = centred.numpy(), w_enc.numpy(), b_enc.numpy()
    if encode == "float32":
        none = np.zeros(centred.shape[0], np.float32)
        nothing = np.zeros(w_enc.shape[0], np.float32)
        margins = nothing, nothing, nothing, np.zeros(3, np.float32), np.float32(0)
        return _Encoder(centred, w_enc, b_enc, exact, ((none, none), margins))
    x, w, bias = round_rows(centred), round_rows(w_enc), b_enc.bfloat16()
    from_sum = w.errors + w.norms * (_UNIT * centred.shape[1])
    from_bias = (bias.float() - b_enc).abs() + float(selection.PRODUCT_ROUNDING) * b_enc.abs()
    largest = torch.stack([w.norms.max(), from_sum.max(), from_bias.max()])
    tokens = (x.norms + x.errors).numpy(), x.errors.numpy()
    features = (w.norms.numpy(), from_sum.numpy(), from_bias.numpy(), largest.numpy())
    return _Encoder(x.rows, w.rows, bias, exact, (tokens, (*features, selection.PRODUCT_ROUNDING)))


def _of_each_token(encoder: _Encoder, k: int, buffers: Buffers) -> SparseCodes:
    shape = encoder.n_tokens, k
    features, values = np.empty(shape, np.int32), np.empty(shape, np.float32)
    counts = np.empty(encoder.n_tokens, np.int64)
    block = _block(encoder.n_features, k)

    def take(span: Range, first: int, chunk: tuple[Array, int]) -> None:
        selection.top_of_tokens(
            span,
            (first, k, block),
            chunk,
            encoder.margins,
            encoder.exact,
            (features, values, counts),
        )

    _over_chunks(take, encoder, buffers)
    kept = np.arange(k) < counts[:, None]
    return _codes(counts, features[kept], values[kept], encoder.n_features)


def _of_batch(encoder: _Encoder, k: int, buffers: Buffers) -> SparseCodes:
    n_kept, excess = k * encoder.n_tokens, 1.4
    while True:
        guess = _guess(encoder, excess * k)
        found = _above(encoder, guess, buffers)
        if guess == 0 or np.count_nonzero(found.values - found.margins >= guess) >= n_kept:
            return _largest_of_batch(found, encoder, n_kept)
        excess *= 4  # the sample misled


def _guess(encoder: _Encoder, per_token: float) -> np.float32:
    """A value that so many entries a token exceed, by the word of some tokens; never below zero."""
    sample = encoder.rows[:: -(-encoder.n_tokens // _GUESS_TOKENS)]
    pre = torch.addmm(encoder.bias, sample, encoder.matrix.T).flatten()
    rank = int(per_token * sample.shape[0]) + 1
    if rank >= pre.numel():
        return np.float32(0)
    bits, shift = _bits(pre)
    kth = np.partition(bits, bits.shape[0] - rank)[-rank:].min(keepdims=True)
    value: np.float32 = (kth.astype(np.int32) << shift).view(np.float32)[0]
    return max(np.float32(0), value)


def _above(encoder: _Encoder, guess: np.float32, buffers: Buffers) -> _Entries:
    block = _block(encoder.n_features, 1 + encoder.n_features // (4 * _LARGEST_BLOCK))

    def take(span: Range, first: int, chunk: tuple[Array, int]) -> tuple[Array, ...]:
        found: tuple[Array, ...] = selection.entries_above(
            span, (first, guess, block), chunk, encoder.margins
        )
        return found

    parts = _over_chunks(take, encoder, buffers)
    counts, features, values, margins = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _Entries(np.repeat(np.arange(counts.shape[0]), counts), features, values, margins)


def _largest_of_batch(found: _Entries, encoder: _Encoder, n_kept: int) -> SparseCodes:
    tokens, features, values, margins = found
    possible = values + margins >= max(0, _kth_largest(values - margins, n_kept))
    tokens, features, values = tokens[possible], features[possible], values[possible]
    if encoder.rows.dtype == torch.bfloat16:
        over_ranges(
            lambda span: selection.refine(span, tokens, features, encoder.exact, values),
            even_ranges(values.shape[0], _ENTRIES_PER_TASK),
        )
    cut = _kth_largest(values, n_kept)
    above, tied = values > max(0, cut), (values == cut) & (values > 0)
    kept = above | (tied & (np.cumsum(tied) <= n_kept - np.count_nonzero(above)))
    counts = np.bincount(tokens[kept], minlength=encoder.n_tokens)
    return _codes(counts, features[kept], values[kept], encoder.n_features)


def _kth_largest(values: Array, k: int) -> float:
    """The k-th largest value, or −∞ where there are fewer."""
    if values.shape[0] < k:
        return -np.inf
    return float(np.partition(values, values.shape[0] - k)[values.shape[0] - k])


def _over_chunks(take: Callable[..., Any], encoder: _Encoder, buffers: Buffers) -> list[Any]:
    """Call ``take`` on ranges of rows of every chunk; the results in the order of the tokens."""
    results = []
    for first, chunk in _chunks(encoder, buffers):
        ranges = even_ranges(chunk[0].shape[0], _TOKENS_PER_TASK)
        results += over_ranges(
            lambda span, first=first, chunk=chunk: take(span, first, chunk),  # type: ignore[misc]
            ranges,
        )
    return results


def _chunks(encoder: _Encoder, buffers: Buffers) -> Iterator[tuple[int, tuple[Array, int]]]:
    """First token, and pre-activations as bits, of each chunk; overwritten by the next."""
    size = max(_TOKENS_PER_TASK, _CHUNK_ELEMENTS // encoder.n_features)
    size = min(encoder.n_tokens, size)
    out = buffers.take("pre-activations", (size, encoder.n_features), encoder.rows.dtype)
    for start, stop in even_ranges(encoder.n_tokens, size):
        chunk = out[: stop - start]
        torch.addmm(encoder.bias, encoder.rows[start:stop], encoder.matrix.T, out=chunk)
        yield start, _bits(chunk)


def _bits(values: Tensor) -> tuple[Array, int]:
    """Values as whole numbers, and how far these stand left in the bits of a float32."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy(), 16
    return values.view(torch.int32).numpy(), 0


def _block(n_features: int, k: int) -> int:
    """Features of which one maximum is taken: few enough that k maxima lie near the k-th value."""
    return max(1, min(_LARGEST_BLOCK, n_features // (4 * k)))


def _codes(counts: Array, features: Array, values: Array, n_features: int) -> SparseCodes:
    offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.from_numpy(counts), 0, out=offsets[1:])
    index = torch.from_numpy(features).to(torch.int64)
    return SparseCodes(offsets, index, torch.from_numpy(values), n_features)
