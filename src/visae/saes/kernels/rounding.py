"""Matrices rounded to bfloat16, with the size of what rounding took from each row.

For rows w, x and their roundings w̃, x̃, the Cauchy–Schwarz inequality gives

    |w̃·x̃ − w·x| ≤ ‖w̃‖ ‖x̃ − x‖ + ‖w̃ − w‖ ‖x‖

whatever the data, so that candidates found in bfloat16 can be kept with a margin that is never
too small. Norms are measured, not bounded by the format's unit.
"""

from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from visae.saes.kernels.threads import compiled, even_ranges, over_ranges

__all__ = ["RoundedRows", "round_rows"]

_ROWS_PER_TASK = 256


class RoundedRows(NamedTuple):
    """Rows in bfloat16."""

    rows: BFloat16[Tensor, "row width"]
    """w̃, to the nearest, ties to even."""
    norms: Float[Tensor, " row"]
    """‖w‖ before rounding."""
    errors: Float[Tensor, " row"]
    """‖w̃ − w‖."""


def round_rows(rows: Float[Tensor, "row width"]) -> RoundedRows:
    """Round a float32 matrix on the CPU, in one pass over it."""
    rounded = torch.empty(rows.shape, dtype=torch.bfloat16)
    norms, errors = torch.empty(rows.shape[0]), torch.empty(rows.shape[0])
    source = rows.contiguous().numpy()
    target = rounded.view(torch.int16).numpy()
    outputs = target, norms.numpy(), errors.numpy()
    over_ranges(
        lambda span: _round_rows(span, source, source.view(np.int32), outputs),
        even_ranges(rows.shape[0], _ROWS_PER_TASK),
    )
    return RoundedRows(rounded, norms, errors)


@compiled
@no_type_check
def _round_rows(span, source, source_bits, out):
    target, norms, errors = out
    width = source.shape[1]
    bits = np.empty(width, np.int32)
    rounded = bits.view(np.float32)
    for row in range(span[0], span[1]):
        for c in range(width):
            one = source_bits[row, c]
            bits[c] = np.int32((one + 0x7FFF + ((one >> 16) & 1)) >> 16 << 16)
            target[row, c] = np.int16(bits[c] >> 16)
        norm, error = np.float32(0), np.float32(0)
        for c in range(width):
            gap = rounded[c] - source[row, c]
            norm += source[row, c] * source[row, c]
            error += gap * gap
        norms[row] = np.sqrt(norm)
        errors[row] = np.sqrt(error)
