"""The largest pre-activations of a chunk of tokens, found in whole numbers and refined exactly.

A positive bfloat16 or float32 is larger exactly when its bits, read as a whole number, are. So a
row of pre-activations is scanned as whole numbers, which needs no conversion:

1. The k-th largest of the maxima of blocks of features is a floor that at least k entries reach.
2. What lies above the floor less twice the margin of rounding is a candidate.
3. Candidates whose own upper bound lies below the k-th largest lower bound are dropped.
4. The value of each one left is computed in float32, and the k largest above zero are kept.

The margin of an entry is a_t ‖w_i‖ + c_t e_i + h_i + 2⁻⁸|p̃|: a and e what rounding took from the
token and from the encoder's row, c the token's norm, h what the bias may be off. With a float32
encode every margin is zero, and step 4 takes the value found. Functions here are compiled and
write into arrays they are given; ``saes/kernels/compiled.py`` calls them.
"""

from typing import no_type_check

import numpy as np

from visae.saes.kernels.threads import compiled, larger

__all__ = ["PRODUCT_ROUNDING", "copy_largest", "entries_above", "refine", "top_of_tokens"]

PRODUCT_ROUNDING = np.float32(2.0**-8)
"""More than the relative rounding of a product written in bfloat16."""


@compiled
@no_type_check
def top_of_tokens(span, numbers, chunk, margins, encoder, out):
    """The k largest of each row of a chunk; row 0 of the chunk is token ``first``.

    Args:
        span: First row to work on, and the row after the last.
        numbers: Token of row 0; how many to keep; features of which one maximum is taken at a time.
        chunk: Bits of the pre-activations, and how far they stand left in 32 bits.
        margins: Norm and rounding of each token; norm, rounding and bias' rounding of each feature,
            and the largest of each.
        encoder: Tokens, encoder rows and biases in float32.
        out: Features, values and their number, a row a token.
    """
    first, k, block = numbers
    bits, shift = chunk
    out_features, out_values, out_counts = out
    n = bits.shape[1]
    maxima = np.empty((n + block - 1) // block, np.int32)
    found, found_bits = np.empty(n, np.int32), np.empty(n, np.int32)
    values = found_bits.view(np.float32)
    upper, ranked = np.empty(n, np.float32), np.empty(n, np.float32)
    for row in range(span[0], span[1]):
        token = first + row
        bound = _kth_block_maximum(chunk, row, k, block, maxima)
        widest = _widest_margin(token, bound, margins)
        n_found = _candidates(chunk, row, bound - 2 * widest, block, maxima, found)
        for i in range(n_found):
            found_bits[i] = np.int32(bits[row, found[i]]) << shift
            margin = _margin(token, found[i], values[i], margins)
            upper[i], ranked[i] = values[i] + margin, values[i] - margin
        cut = _kth_largest(ranked, n_found, k) if n_found > k else np.float32(0)
        n_kept = 0
        for i in range(n_found):
            if upper[i] >= cut:
                found[n_kept], values[n_kept] = found[i], values[i]
                n_kept += 1
        if shift:
            _products(token, found[:n_kept], encoder, values)
        ranked[:n_kept] = values[:n_kept]
        cut = _kth_largest(ranked, n_kept, k) if n_kept > k else np.float32(0)
        n_ties = k
        for i in range(n_kept):
            n_ties -= values[i] > cut
        count = 0
        for i in range(n_kept):
            tied = values[i] == cut and cut > 0 and n_ties > 0
            if values[i] > cut or tied:
                n_ties -= tied
                out_features[token, count], out_values[token, count] = found[i], values[i]
                count += 1
        out_counts[token] = count


@compiled
@no_type_check
def entries_above(span, numbers, chunk, margins):
    """Every entry of some rows whose value may reach a guess, or exceed zero if the guess is zero.

    Returns the number of each row, and the features, values and margins of all, row after row.
    """
    first, guess, block = numbers
    bits, shift = chunk
    n, start, stop = bits.shape[1], span[0], span[1]
    maxima = np.empty((n + block - 1) // block, np.int32)
    capacity = (stop - start) * n
    counts = np.empty(stop - start, np.int64)
    all_features, all_bits = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    values, widths = all_bits.view(np.float32), np.empty(capacity, np.float32)
    total = 0
    for row in range(start, stop):
        token = first + row
        found = all_features[total:]
        _kth_block_maximum(chunk, row, maxima.shape[0] + 1, block, maxima)
        floor = guess - _widest_margin(token, guess, margins)
        n_found = _candidates(chunk, row, floor, block, maxima, found)
        for i in range(total, total + n_found):
            all_bits[i] = np.int32(bits[row, all_features[i]]) << shift
            widths[i] = _margin(token, all_features[i], values[i], margins)
        counts[row - start] = n_found
        total += n_found
    return counts, all_features[:total].copy(), values[:total].copy(), widths[:total].copy()


@compiled
@no_type_check
def copy_largest(span, k, bits, kept):
    """Copy the k largest of some rows, where they exceed zero; of equal ones, the first."""
    ranked = np.empty(bits.shape[1], bits.dtype)
    for row in range(span[0], span[1]):
        ranked[:] = bits[row]
        cut = max(0, _kth_largest(ranked, ranked.shape[0], min(k, ranked.shape[0])))
        n_ties = k
        for j in range(bits.shape[1]):
            n_ties -= bits[row, j] > cut
        for j in range(bits.shape[1]):
            if bits[row, j] > cut or (bits[row, j] == cut and n_ties > 0):
                n_ties -= bits[row, j] == cut
                kept[row, j] = bits[row, j]


@compiled
@no_type_check
def refine(span, entry_tokens, entry_features, encoder, values):
    """The float32 pre-activation of each entry; those of one token stand together."""
    start = span[0]
    while start < span[1]:
        token, stop = entry_tokens[start], start + 1
        while stop < span[1] and entry_tokens[stop] == token:
            stop += 1
        _products(token, entry_features[start:stop], encoder, values[start:stop])
        start = stop


@compiled
@no_type_check
def _product(token, feature, encoder):
    centred, w_enc, b_enc = encoder
    x, w, total = centred[token], w_enc[feature], np.float32(0)
    for c in range(x.shape[0]):
        total += x[c] * w[c]
    return total + b_enc[feature]


@compiled
@no_type_check
def _products(token, features, encoder, values):
    """Products of a token, four rows at a time: memory then answers four requests at once."""
    centred, w_enc, b_enc = encoder
    x, i = centred[token], 0
    while i + 4 <= features.shape[0]:
        a, b, c, d = features[i], features[i + 1], features[i + 2], features[i + 3]
        of_a, of_b, of_c, of_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(x.shape[0]):
            of_a += x[j] * w_enc[a, j]
            of_b += x[j] * w_enc[b, j]
            of_c += x[j] * w_enc[c, j]
            of_d += x[j] * w_enc[d, j]
        values[i], values[i + 1] = of_a + b_enc[a], of_b + b_enc[b]
        values[i + 2], values[i + 3] = of_c + b_enc[c], of_d + b_enc[d]
        i += 4
    while i < features.shape[0]:
        values[i] = _product(token, features[i], encoder)
        i += 1


@compiled
@no_type_check
def _margin(token, feature, value, margins):
    token_norms, token_errors = margins[0]
    norms, errors, bias_errors, _, rounding = margins[1]
    from_rows = token_errors[token] * norms[feature] + token_norms[token] * errors[feature]
    return from_rows + bias_errors[feature] + rounding * abs(value)


@compiled
@no_type_check
def _widest_margin(token, value, margins):
    token_norms, token_errors = margins[0]
    _, _, _, largest, rounding = margins[1]
    from_rows = token_errors[token] * largest[0] + token_norms[token] * largest[1]
    return from_rows + largest[2] + rounding * abs(value)


@compiled
@no_type_check
def _kth_block_maximum(chunk, row, k, block, maxima):
    """The value of the k-th largest maximum of a block, or 0 where fewer are above zero."""
    bits, shift = chunk
    for b in range(maxima.shape[0]):
        inside = bits[row, b * block : (b + 1) * block]
        maximum = inside[0]
        for j in range(inside.shape[0]):
            maximum = larger(maximum, inside[j])
        maxima[b] = maximum
    if k > maxima.shape[0]:
        return np.float32(0)
    kth = np.empty(1, np.int32)
    kth[0] = _kth_largest(maxima.copy(), maxima.shape[0], k) << shift
    return max(np.float32(0), kth.view(np.float32)[0])


@compiled
@no_type_check
def _candidates(chunk, row, floor, block, maxima, found):
    """List the features at or above a floor, by number; every one near or above zero if it is not.

    Entries below zero are listed too when the floor is not above zero, for a margin may lift them.
    """
    bits, shift = chunk
    n, count = bits.shape[1], 0
    if not floor > 0:
        lowest = np.empty(1, np.float32)
        lowest[0] = -floor
        limit = lowest.view(np.int32)[0] >> shift
        for j in range(n):  # the bits of a value below zero: the sign, then those of its size
            size = np.int32(bits[row, j]) & (0x7FFFFFFF >> shift)
            if bits[row, j] >= 0 or size <= limit:
                found[count] = j
                count += 1
        return count
    least = np.empty(1, np.float32)
    least[0] = floor
    limit = least.view(np.int32)[0] >> shift
    for b in range(maxima.shape[0]):
        if maxima[b] >= limit:
            for j in range(b * block, min(n, (b + 1) * block)):
                found[count] = j  # without a branch: written over unless counted
                count += bits[row, j] >= limit
    return count


@compiled
@no_type_check
def _kth_largest(values, count, k):
    """The k-th largest of the first ``count`` values, which are reordered."""
    low, high, target = 0, count - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return values[target]
