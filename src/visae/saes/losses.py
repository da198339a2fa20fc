"""Training losses, in normalised units; each takes one batch and one SAE.

    reconstruction   mean over tokens of ‖x̂' − x'‖² / d_model
    Matryoshka       mean of that over nested prefixes of the features (2503.17547)
    AuxK             α ‖ê − e‖² / ‖e − ē‖², e the residual, ê built by dead features (2406.04093)

Source: METHODS §2, §3.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from visae.saes.codes import SparseCodes
from visae.saes.kernels.sparse import FeatureLists, active_values, nested_decode
from visae.saes.sae import SAE

__all__ = ["BatchLoss", "auxk_loss", "batch_loss"]

_LEAST_SPREAD = 1e-10  # of the mean square error


class BatchLoss(NamedTuple):
    """The loss of one batch, with what the training loop reports and reuses."""

    total: Float[Tensor, ""]
    """What the optimiser lowers."""
    reconstruction: Float[Tensor, ""]
    """Mean over tokens of ‖x̂' − x'‖² / d_model, of the whole dictionary."""
    auxk: Float[Tensor, ""]
    """The dead features' loss, α included; 0 where none is dead."""
    codes: SparseCodes
    """Codes of the batch, without gradient."""


def batch_loss(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " feature"],
    *,
    auxk_alpha: float,
    penalty_share: float = 1.0,
) -> BatchLoss:
    """Reconstruction, sparsity penalty and dead-feature loss of a batch of raw activations.

    ``penalty_share`` scales the sparsity penalty, for its warm-up.
    """
    x_normal = sae.normalise(x)
    centred = x_normal - sae.b_dec.detach()
    with torch.no_grad():
        codes = sae.config.sparsity.select(linear(centred, sae.W_enc, sae.b_enc))
    lists = FeatureLists(codes)
    values = active_values(centred, sae.W_enc, sae.b_enc, sae.b_dec, lists)
    bounds = sae.config.prefixes or (sae.n_features,)
    rebuilt = nested_decode(values, sae.W_dec, sae.b_dec, lists, bounds)
    nested = mse_loss(rebuilt, x_normal.expand_as(rebuilt))
    penalty = penalty_share * _penalty(sae, values, codes)
    residual = x_normal - rebuilt[-1].detach()
    auxk = auxk_alpha * auxk_loss(sae, centred, residual, dead)
    return BatchLoss(nested + penalty + auxk, residual.square().mean(), auxk.detach(), codes)


def _penalty(sae: SAE, values: Float[Tensor, " entry"], codes: SparseCodes) -> Float[Tensor, ""]:
    """The sparsity kind's own term."""
    norms = sae.W_dec.norm(dim=1)
    # index_select, not indexing: the sums of its gradient have a fixed order
    of_entries = norms.index_select(0, codes.features)
    return sae.config.sparsity.penalty(values, of_entries, codes.n_tokens)


def auxk_loss(
    sae: SAE,
    centred: Float[Tensor, "token d_model"],
    residual: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " feature"],
) -> Float[Tensor, ""]:
    """‖ê − e‖² / ‖e − ē‖² with e = x' − x̂' rebuilt by the k_aux most excited dead features.

    ê = Σ ReLU(p_i) W_dec,i without b_dec; k_aux is the largest power of two ≤ d_model / 2.
    Gradients reach the encoder and decoder rows of dead features and nothing else.
    """
    index = torch.nonzero(dead).flatten()
    if index.numel() == 0:
        return residual.new_zeros(())
    k_aux = min(2 ** max(0, (sae.d_model // 2).bit_length() - 1), index.numel())
    w_enc, b_enc, w_dec = (p.index_select(0, index) for p in (sae.W_enc, sae.b_enc, sae.W_dec))
    pre = linear(centred, w_enc, b_enc)
    kept = pre.topk(k_aux, dim=1, sorted=False)
    excited = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    error = mse_loss(excited @ w_dec, residual)
    spread = mse_loss(residual, residual.mean(dim=0).expand_as(residual))
    # all tokens left with one error: nothing to explain, and a quotient by rounding or by zero
    has_spread = spread > _LEAST_SPREAD * residual.square().mean()
    return error / torch.where(has_spread, spread, torch.inf)
