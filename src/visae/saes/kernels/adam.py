"""Adam over rows in one pass: clipped gradient, both means, parameter, unit row.

    m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
    w ← w − rate / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)            β 0.9, 0.999, ε 6.25e-10

A row without gradient takes g = 0: its means still decay and it still moves, as in the dense
optimiser. Source: 1412.6980; METHODS §4.
"""

from typing import NamedTuple, no_type_check

import numpy as np

from visae.saes.kernels.threads import compiled

__all__ = ["BETAS", "EPSILON", "StepFactors", "adam_rows", "step_factors"]

BETAS = (0.9, 0.999)
"""Decay of the means of gradients and of their squares."""

EPSILON = 6.25e-10
"""Added to the root of the mean square."""

_LEAST_NORM = np.float32(1e-12)


class StepFactors(NamedTuple):
    """The numbers of one update, the same for every parameter."""

    clip: np.float32
    """What gradients are multiplied by so that their norm stays below the limit."""
    size: np.float32
    """rate / (1 − β₁ᵗ)."""
    root: np.float32
    """√(1 − β₂ᵗ)."""
    decay: np.float32 = np.float32(BETAS[0])
    """β₁."""
    rest: np.float32 = np.float32(1 - BETAS[0])
    """1 − β₁."""
    decay_square: np.float32 = np.float32(BETAS[1])
    """β₂."""
    rest_square: np.float32 = np.float32(1 - BETAS[1])
    """1 − β₂."""
    epsilon: np.float32 = np.float32(EPSILON)
    """ε."""


def step_factors(rate: float, step: int, *, norm: float, clip_norm: float) -> StepFactors:
    """The factors of step number ``step``, from 1, for gradients of some global norm."""
    return StepFactors(
        clip=np.float32(min(1.0, clip_norm / (norm + 1e-6))),
        size=np.float32(rate / (1 - BETAS[0] ** step)),
        root=np.float32((1 - BETAS[1] ** step) ** 0.5),
    )


@compiled
@no_type_check
def adam_rows(span, weights, gradients, factors, unit_rows):
    """Update some rows of a matrix in place, and make them unit where that is asked.

    ``weights`` are a parameter and its two means; ``gradients`` its gradient and the rows that have
    one.
    """
    clip, size, root, decay, rest, decay_square, rest_square, epsilon = factors
    for row in range(span[0], span[1]):
        weight, mean, square = weights[0][row], weights[1][row], weights[2][row]
        gradient = gradients[0][row]
        if gradients[1][row]:
            for c in range(weight.shape[0]):
                g = clip * gradient[c]
                mean[c] = decay * mean[c] + rest * g
                square[c] = decay_square * square[c] + rest_square * g * g
        else:
            for c in range(weight.shape[0]):
                mean[c] *= decay
                square[c] *= decay_square
        norm = np.float32(0)
        for c in range(weight.shape[0]):
            weight[c] -= size * mean[c] / (np.sqrt(square[c]) / root + epsilon)
            norm += weight[c] * weight[c]
        if unit_rows:
            norm = max(np.sqrt(norm), _LEAST_NORM)
            for c in range(weight.shape[0]):
                weight[c] /= norm
