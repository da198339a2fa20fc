"""Decode, errors and gradients from sparse codes, row by row.

Tokens are decoded with their entries' decoder rows, prefix after prefix, and the same rows then
meet the error again for the gradient of each entry. Gradients of weights are summed feature by
feature over a list of the entries sorted by feature, so that each row is written once. Functions
here are compiled and write into arrays they are given; equations in ``saes/kernels/interface.py``.
"""

from typing import no_type_check

import numpy as np

from visae.saes.kernels.threads import compiled

__all__ = ["decode_tokens", "gradient_rows", "sort_by_feature"]


@compiled
@no_type_check
def decode_tokens(span, x_normal, codes, decoder, prefixes, out):
    """Errors of some tokens times ``step``, the entries' gradients, and Σ‖r_m‖² of each prefix."""
    offsets, features, values = codes
    w_dec, b_dec = decoder
    bounds, step = prefixes
    rows, grad_values = out
    d_model = x_normal.shape[1]
    rebuilt, sums = np.empty(d_model, np.float32), np.zeros(bounds.shape[0])
    for t in range(span[0], span[1]):
        entry, end = offsets[t], offsets[t + 1]
        for c in range(d_model):
            rebuilt[c] = b_dec[c] - x_normal[t, c]
        for m in range(bounds.shape[0]):
            first = entry
            while entry < end and features[entry] < bounds[m]:
                entry += 1
            _add_rows(rebuilt, w_dec, features[first:entry], values[first:entry])
            sums[m] += _scale_into(rows[t, m], rebuilt, step)
        for m in range(bounds.shape[0] - 2, -1, -1):
            for c in range(d_model):
                rows[t, m, c] += rows[t, m + 1, c]
        m = 0
        for i in range(offsets[t], end):
            while features[i] >= bounds[m]:
                m += 1
            grad_values[i] = _dot(rows[t, m], w_dec[features[i]])
    return sums


@compiled
@no_type_check
def sort_by_feature(features, n_features):
    """Where each feature's entries start, and the entries by feature, then by token."""
    starts = np.zeros(n_features + 1, np.int64)
    for f in features:
        starts[f + 1] += 1
    for f in range(n_features):
        starts[f + 1] += starts[f]
    place, order = starts[:-1].copy(), np.empty(features.shape[0], np.int64)
    for entry in range(features.shape[0]):
        order[place[features[entry]]] = entry
        place[features[entry]] += 1
    return starts, order


@compiled
@no_type_check
def gradient_rows(span, lists, errors, decoder, extra, out):
    """Gradients of some features' rows, the decoder's without the part along its row.

    ``extra`` are rows to add, and for each feature which of them, or −1. A feature without entry
    or extra row is left alone. ``squares`` of the output takes each feature's squared norm.
    """
    starts, order, entry_tokens, values, grad_values = lists
    w_dec, bounds = decoder
    centred, rows = errors
    flat_rows = rows.reshape(-1, rows.shape[2])
    extra_index, extra_enc, extra_bias, extra_dec = extra
    grad_enc, grad_bias, grad_dec, touched, squares = out
    m = 0
    for f in range(span[0], span[1]):
        while f >= bounds[m]:
            m += 1
        squares[f], grad_bias[f] = 0, 0
        which = extra_index[f]
        touched[f] = starts[f + 1] > starts[f] or which >= 0
        if not touched[f]:
            continue
        grad_enc[f], grad_dec[f] = 0, 0
        if which >= 0:
            grad_bias[f] = extra_bias[which]
            grad_enc[f], grad_dec[f] = extra_enc[which], extra_dec[which]
        own = order[starts[f] : starts[f + 1]]
        for i in own:
            grad_bias[f] += grad_values[i]
        tokens = entry_tokens[own]
        _add_rows(grad_enc[f], centred, tokens, grad_values[own])
        _add_rows(grad_dec[f], flat_rows, tokens * bounds.shape[0] + m, values[own])
        squares[f] = _project(grad_dec[f], w_dec[f])
        squares[f] += grad_bias[f] ** 2 + _dot(grad_enc[f], grad_enc[f])


@compiled
@no_type_check
def _add_rows(total, matrix, index, weights):
    """Add weighted rows, four at a time: memory then answers four requests at once."""
    i = 0
    while i + 4 <= index.shape[0]:
        a, b, c, d = (
            matrix[index[i]],
            matrix[index[i + 1]],
            matrix[index[i + 2]],
            matrix[index[i + 3]],
        )
        u, v, w, x = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for j in range(total.shape[0]):
            total[j] += (u * a[j] + v * b[j]) + (w * c[j] + x * d[j])
        i += 4
    while i < index.shape[0]:
        a, u = matrix[index[i]], weights[i]
        for j in range(total.shape[0]):
            total[j] += u * a[j]
        i += 1


@compiled
@no_type_check
def _scale_into(target, source, factor):
    """Write a multiple of a row; the row's own squared norm."""
    square = np.float32(0)
    for c in range(target.shape[0]):
        square += source[c] * source[c]
        target[c] = factor * source[c]
    return square


@compiled
@no_type_check
def _dot(one, other):
    total = np.float32(0)
    for c in range(one.shape[0]):
        total += one[c] * other[c]
    return total


@compiled
@no_type_check
def _project(gradient, row):
    """Take the part of a gradient along a unit row out; the squared norm of what is left."""
    along, square = _dot(gradient, row), np.float32(0)
    for c in range(row.shape[0]):
        gradient[c] -= along * row[c]
        square += gradient[c] * gradient[c]
    return square
