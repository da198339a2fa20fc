"""Codes of a batch by plain torch operations, a chunk of tokens at a time.

TopK takes the 2k largest of each token's bfloat16 pre-activations as candidates. Where the margin
of rounding does not prove that the k largest of float32 are among them, the token is encoded again
in float32. BatchTopK takes all that may reach a guess of the threshold, and guesses lower when
fewer than k·B surely do. Margins are those of ``saes/kernels/selection.py``.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import linear

from visae.saes.codes import SparseCodes, active_entries
from visae.saes.kernels.interface import Batch, Encode, Keep, Weights

__all__ = ["entry_groups", "largest_of_rows", "plain_codes", "row_products", "starts_of"]

Products = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Rows, which of them, other rows, which of those: the product of each pair."""


_CHUNK_ELEMENTS = 2**24
_PRODUCT_ROUNDING = 2.0**-8
_UNIT = 2.0**-24  # of float32
_PRODUCT_ROWS = 2**14
_GUESS_TOKENS = 64


def plain_codes(
    centred: Float[Tensor, "token d_model"],
    weights: Weights,
    keep: Keep,
    *,
    encode: Encode,
    products: Products | None = None,
) -> SparseCodes:
    """The codes that ``Kernels.codes`` promises, by plain torch operations.

    ``products`` takes the place of ``row_products``.
    """
    encoder = _encoder(centred, weights, encode, products or row_products)
    k = min(keep.k, weights.w_enc.shape[0])
    if keep.over == "batch":
        return _of_batch(encoder, k)
    parts = [_of_each_token(encoder, chunk, k) for chunk in _chunks(encoder)]
    return SparseCodes.join(parts)


def row_products(
    rows: Float[Tensor, "row width"],
    row_index: Int64[Tensor, " entry"],
    others: Float[Tensor, "other width"],
    other_index: Int64[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """The product of one row of each matrix for every entry, some thousand entries at a time."""
    starts = range(0, row_index.shape[0], _PRODUCT_ROWS)
    pieces = [slice(start, start + _PRODUCT_ROWS) for start in starts] or [slice(0)]
    return torch.cat([(rows[row_index[p]] * others[other_index[p]]).sum(1) for p in pieces])


def largest_of_rows(pre: Float[Tensor, "token chosen"], k: int) -> Float[Tensor, "token chosen"]:
    """The k largest of each row where they exceed zero, and zero elsewhere."""
    kept = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre).scatter_(1, kept.indices, kept.values.relu_())


def entry_groups(batch: Batch, codes: SparseCodes) -> Int64[Tensor, " entry"]:
    """Token · n_prefixes + the first prefix with the entry's feature; ascending."""
    ends = torch.tensor(batch.bounds[:-1], dtype=torch.int64, device=codes.features.device)
    prefix = torch.bucketize(codes.features, ends, right=True)
    return codes.tokens * len(batch.bounds) + prefix


def starts_of(bag: Int64[Tensor, " entry"], n_bags: int) -> Int64[Tensor, " bag_plus_one"]:
    """Where each bag starts once entries are sorted by bag, and the number of entries."""
    counts = torch.bincount(bag, minlength=n_bags)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Encoder(NamedTuple):
    """Both factors of the product, exact and as multiplied, and what rounding took from them."""

    centred: Tensor
    """Tokens, float32."""
    weights: Weights
    """Float32."""
    rows: Tensor
    """Tokens, as multiplied."""
    matrix: Tensor
    """Encoder rows, as multiplied."""
    bias: Tensor
    """Encoder biases, as added."""
    token_norms: Tensor
    """Norm of each token as multiplied."""
    token_errors: Tensor
    """Norm of what rounding took from each token."""
    norms: Tensor
    """Norm of each encoder row, zero where nothing is rounded."""
    errors: Tensor
    """Norm of what rounding and summing may take from each encoder row."""
    bias_errors: Tensor
    """What each bias may be off."""
    products: Products
    """How values are refined."""

    @property
    def is_exact(self) -> bool:
        return self.rows.dtype != torch.bfloat16

    def pre(self, chunk: slice) -> Tensor:
        return torch.addmm(self.bias, self.rows[chunk], self.matrix.T)

    def margins(self, tokens: Tensor, features: Tensor, values: Tensor) -> Tensor:
        if self.is_exact:
            return torch.zeros_like(values)
        from_rows = self.token_errors[tokens] * self.norms[features]
        from_rows += self.token_norms[tokens] * self.errors[features]
        return from_rows + self.bias_errors[features] + _PRODUCT_ROUNDING * values.abs()

    def widest(self, chunk: slice) -> Tensor:
        """A bound on the margins of each token of a chunk, but for the product's own rounding."""
        if self.is_exact:
            return self.rows.new_zeros(self.rows[chunk].shape[0])
        from_rows = self.token_errors[chunk] * self.norms.max()
        from_rows = from_rows + self.token_norms[chunk] * self.errors.max()
        return from_rows + self.bias_errors.max()


def _encoder(centred: Tensor, weights: Weights, encode: Encode, products: Products) -> _Encoder:
    w_enc, b_enc = weights.w_enc, weights.b_enc
    if encode == "float32":
        none = centred.new_zeros(0)
        return _Encoder(
            centred, weights, centred, w_enc, b_enc, none, none, none, none, none, products
        )
    x, w, b = centred.bfloat16(), w_enc.bfloat16(), b_enc.bfloat16()
    norms = w_enc.norm(dim=1)
    return _Encoder(
        *(centred, weights, x, w, b),
        token_norms=x.float().norm(dim=1),
        token_errors=(x.float() - centred).norm(dim=1),
        norms=norms,
        errors=(w.float() - w_enc).norm(dim=1) + norms * (_UNIT * centred.shape[1]),
        bias_errors=(b.float() - b_enc).abs() + _PRODUCT_ROUNDING * b_enc.abs(),
        products=products,
    )


def _chunks(encoder: _Encoder) -> Iterator[slice]:
    n_tokens, step = encoder.rows.shape[0], max(64, _CHUNK_ELEMENTS // encoder.matrix.shape[0])
    for start in range(0, max(1, n_tokens), step):
        yield slice(start, min(start + step, n_tokens))


def _of_each_token(encoder: _Encoder, chunk: slice, k: int) -> SparseCodes:
    pre = encoder.pre(chunk)
    if encoder.is_exact:
        return _top(pre, _every_feature(pre), k, pre.shape[1])
    n_features = pre.shape[1]
    found = pre.topk(min(2 * k, n_features), dim=1)
    values, features = found.values.float(), found.indices
    tokens = torch.arange(chunk.start, chunk.stop, device=pre.device)[:, None].expand_as(features)
    margins = encoder.margins(tokens, features, values)
    cut = (values - margins).topk(k, dim=1).values[:, -1].clamp_min(0)
    possible = values + margins >= cut[:, None]
    values = values.masked_fill(~possible, -torch.inf)
    values[possible] = _refined(encoder, tokens[possible], features[possible])
    codes = _top(values, features, k, n_features)
    least = found.values[:, -1].float()
    unlisted = least + _PRODUCT_ROUNDING * least.abs() + encoder.widest(chunk)
    unproven = torch.nonzero(unlisted >= cut).flatten()
    if features.shape[1] == n_features or unproven.numel() == 0:
        return codes
    return _encoded_again(encoder, codes, unproven, chunk, k)


def _encoded_again(
    encoder: _Encoder, codes: SparseCodes, unproven: Tensor, chunk: slice, k: int
) -> SparseCodes:
    """The codes of a chunk, with those of some rows found in float32."""
    again = linear(
        encoder.centred[chunk.start + unproven], encoder.weights.w_enc, encoder.weights.b_enc
    )
    proven = _top(again, _every_feature(again), k, again.shape[1])
    place = torch.arange(codes.n_tokens, device=again.device)
    place[unproven] = codes.n_tokens + torch.arange(unproven.shape[0], device=again.device)
    return SparseCodes.join([codes, proven]).take(place)


def _every_feature(pre: Tensor) -> Tensor:
    return torch.arange(pre.shape[1], device=pre.device).expand_as(pre)


def _top(values: Tensor, features: Tensor, k: int, n_features: int) -> SparseCodes:
    """The k largest of each row above zero, by ascending feature."""
    kept = values.topk(k, dim=1, sorted=False)
    order = features.gather(1, kept.indices).sort(dim=1)
    chosen = kept.values.gather(1, order.indices)
    alive = chosen > 0
    tokens = torch.nonzero(alive)[:, 0]
    shape = values.shape[0], n_features
    return SparseCodes.from_entries(tokens, order.values[alive], chosen[alive], shape)


def _refined(encoder: _Encoder, tokens: Tensor, features: Tensor) -> Tensor:
    """The float32 pre-activations of some entries."""
    products = encoder.products(encoder.centred, tokens, encoder.weights.w_enc, features)
    return products + encoder.weights.b_enc[features]


def _of_batch(encoder: _Encoder, k: int) -> SparseCodes:
    n_kept, excess = k * encoder.rows.shape[0], 1.4
    while True:
        guess = _guess(encoder, excess * k)
        tokens, features, values, margins = _above(encoder, guess)
        if guess == 0 or torch.count_nonzero(values - margins >= guess) >= n_kept:
            break
        excess *= 4  # the sample misled
    possible = values + margins >= max(0.0, _kth_largest(values - margins, n_kept))
    tokens, features, values = tokens[possible], features[possible], values[possible]
    if not encoder.is_exact:
        values = _refined(encoder, tokens, features)
    cut = _kth_largest(values, n_kept)
    above, tied = values > max(0.0, cut), (values == cut) & (values > 0)
    kept = above | (tied & (tied.cumsum(0) <= n_kept - above.sum()))
    shape = encoder.rows.shape[0], encoder.matrix.shape[0]
    return SparseCodes.from_entries(tokens[kept], features[kept], values[kept], shape)


def _guess(encoder: _Encoder, per_token: float) -> float:
    """A value that so many entries a token exceed, by the word of some tokens; never below zero."""
    step = -(-encoder.rows.shape[0] // _GUESS_TOKENS)
    pre = torch.addmm(encoder.bias, encoder.rows[::step], encoder.matrix.T)
    rank = int(per_token * pre.shape[0]) + 1
    if rank >= pre.numel():
        return 0.0
    return max(0.0, _kth_largest(pre.flatten().float(), rank))


def _above(encoder: _Encoder, guess: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, features, values and margins of all entries that may reach a guess."""
    parts = []
    for chunk in _chunks(encoder):
        pre = encoder.pre(chunk)
        floor = guess * (1 - _PRODUCT_ROUNDING) - encoder.widest(chunk)
        rows, features = active_entries(pre >= floor[:, None])
        values = pre[rows, features].to(encoder.centred.dtype)
        tokens = chunk.start + rows
        parts.append((tokens, features, values, encoder.margins(tokens, features, values)))
    tokens, features, values, margins = (torch.cat(each) for each in zip(*parts, strict=True))
    return tokens, features, values, margins


def _kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest value, or −∞ where there are fewer."""
    if values.numel() < k:
        return -torch.inf
    return float(values.topk(k, sorted=False).values.min())
