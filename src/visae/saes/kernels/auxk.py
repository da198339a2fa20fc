"""The dead features' loss and its gradients, in closed form.

    ê = Σ over the k_aux largest p_i among dead features of ReLU(p_i) W_dec,i
    L = α ‖ê − e‖² / ‖e − ē‖²       H = ∂L/∂ê = 2 α (ê − e) / ‖e − ē‖²
    ∂L/∂W_dec = fᵀ H      ∂L/∂W_enc = (H W_decᵀ at f > 0)ᵀ c

for residuals e, which the gradient does not enter, and what the encoder sees c. The products are
dense over the dead features, of which k_aux is a good part, and run in the precision of the encode.
Source: 2406.04093; METHODS §3.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from visae.saes.kernels.interface import ExtraRows, Kernels, Weights

__all__ = ["DeadFeatures", "dead_features", "n_auxiliary"]

_LEAST_SPREAD = 1e-10  # of the mean square error


class DeadFeatures(NamedTuple):
    """What the dead features' loss is, and what it sends back."""

    loss: Float[Tensor, ""]
    """L, α included."""
    rows: ExtraRows
    """Its gradients."""


def n_auxiliary(d_model: int) -> int:
    """k_aux: the largest power of two ≤ d_model / 2."""
    return int(2 ** max(0, (d_model // 2).bit_length() - 1))


def dead_features(
    kernels: Kernels,
    weights: Weights,
    centred: Float[Tensor, "token d_model"],
    *,
    residual: Float[Tensor, "token d_out"],
    features: Int64[Tensor, " chosen"],
    alpha: float,
) -> DeadFeatures:
    """The loss of some dead features, at least one, and the gradients of their rows."""
    dtype = torch.bfloat16 if kernels.encode == "bfloat16" else torch.float32
    w_enc, b_enc, w_dec = (t[features].to(dtype) for t in weights[:3])
    seen = centred.to(dtype)
    f = kernels.keep_largest(torch.addmm(b_enc, seen, w_enc.T), n_auxiliary(residual.shape[1]))
    error = (f @ w_dec).float() - residual
    spread = (residual - residual.mean(0)).square().sum()
    # all tokens left with one error: nothing to explain, and a quotient by rounding or by zero
    has_spread = spread > _LEAST_SPREAD * residual.square().sum()
    scale = alpha / torch.where(has_spread, spread, torch.inf)
    loss = scale * error.square().sum()
    slope = error.mul_(2 * scale).to(dtype)
    grad_f = (slope @ w_dec.T).mul_(f > 0)
    rows = ExtraRows(
        features,
        w_enc=(grad_f.T @ seen).float(),
        b_enc=grad_f.sum(0, dtype=torch.float32),
        w_dec=(f.T @ slope).float(),
    )
    return DeadFeatures(loss, rows)
