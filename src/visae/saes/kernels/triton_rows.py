"""The engine's kernels for CUDA devices, in Triton: one program a token, an entry or a feature.

A row of ``d_model`` numbers is one block, padded to a power of two, so that each program reads
rows whole and in order. Equations in ``saes/kernels/interface.py``; launched by
``saes/kernels/triton_kernels.py``. Triton is optional: import this module only where it is there.
"""
# ruff: noqa: N803, PLR0913, PLR0917  (a kernel takes pointers one by one, and constants in capitals)

from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["adam_row", "decode_token", "gradient_row", "product"]


@triton.jit
@no_type_check
def product(out, rows, row_index, others, other_index, width, BLOCK: tl.constexpr):
    """The product of one row of each matrix."""
    entry = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    row, other = tl.load(row_index + entry), tl.load(other_index + entry)
    one = tl.load(rows + row * width + c, c < width, 0.0)
    two = tl.load(others + other * width + c, c < width, 0.0)
    tl.store(out + entry, tl.sum(one * two, 0))


@triton.jit
@no_type_check
def decode_token(
    wanted, starts, features, values, w_dec, b_dec, rows, grad_values, squares, step,
    n_prefixes, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Errors of one token by every prefix, then from the last to the first what they send back."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    error = tl.load(b_dec + c, inside, 0.0) - tl.load(wanted + token * width + c, inside, 0.0)
    for m in range(n_prefixes):
        place = token * n_prefixes + m
        for entry in range(tl.load(starts + place), tl.load(starts + place + 1)):
            row = tl.load(w_dec + tl.load(features + entry) * width + c, inside, 0.0)
            error += tl.load(values + entry) * row
        tl.store(rows + place * width + c, error, inside)
        tl.store(squares + place, tl.sum(error * error, 0))
    slope = tl.zeros([BLOCK], tl.float32)
    for back in range(n_prefixes):
        place = token * n_prefixes + n_prefixes - 1 - back
        slope += step * tl.load(rows + place * width + c, inside, 0.0)
        tl.store(rows + place * width + c, slope, inside)
        for entry in range(tl.load(starts + place), tl.load(starts + place + 1)):
            row = tl.load(w_dec + tl.load(features + entry) * width + c, inside, 0.0)
            tl.store(grad_values + entry, tl.sum(slope * row, 0))


@triton.jit
@no_type_check
def gradient_row(
    starts, order, tokens, row_of_entry, values, grad_values, centred, rows, w_dec,
    extra_index, extra_enc, extra_bias, extra_dec, grad_enc, grad_bias, grad_dec, squares,
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one feature's rows, the decoder's without the part along its row."""
    feature = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    which = tl.load(extra_index + feature)
    enc = tl.load(extra_enc + which * width + c, inside, 0.0)
    dec = tl.load(extra_dec + which * width + c, inside, 0.0)
    bias = tl.load(extra_bias + which)
    for i in range(tl.load(starts + feature), tl.load(starts + feature + 1)):
        entry = tl.load(order + i)
        slope = tl.load(grad_values + entry)
        bias += slope
        enc += slope * tl.load(centred + tl.load(tokens + entry) * width + c, inside, 0.0)
        row = tl.load(rows + tl.load(row_of_entry + entry) * width + c, inside, 0.0)
        dec += tl.load(values + entry) * row
    direction = tl.load(w_dec + feature * width + c, inside, 0.0)
    dec -= tl.sum(dec * direction, 0) * direction
    tl.store(grad_enc + feature * width + c, enc, inside)
    tl.store(grad_dec + feature * width + c, dec, inside)
    tl.store(grad_bias + feature, bias)
    tl.store(squares + feature, tl.sum(enc * enc, 0) + tl.sum(dec * dec, 0) + bias * bias)


@triton.jit
@no_type_check
def adam_row(
    weight, gradient, mean, square, clips, size, root, decay, decay_square, epsilon,
    width, UNIT_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's step of Adam, and the row made unit where that is asked."""
    place = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    g = tl.load(clips) * tl.load(gradient + place, inside, 0.0)
    m = decay * tl.load(mean + place, inside, 0.0) + (1 - decay) * g
    v = decay_square * tl.load(square + place, inside, 0.0) + (1 - decay_square) * g * g
    w = tl.load(weight + place, inside, 0.0) - size * m / (tl.sqrt(v) / root + epsilon)
    w = tl.where(inside, w, 0.0)
    if UNIT_ROWS:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12)
    tl.store(mean + place, m, inside)
    tl.store(square + place, v, inside)
    tl.store(weight + place, w, inside)
