"""Training losses, in normalised units; each takes one batch and one SAE.

    reconstruction   mean over tokens of ‖x̂' − x'‖² / d_model
    Matryoshka       mean of that over nested prefixes of the features (2503.17547)
    AuxK             α ‖ê − e‖² / ‖e − ē‖², e the residual, ê built by dead features (2406.04093)

Source: METHODS §2, §3.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from visae.saes.codes import SparseCodes
from visae.saes.kernels.sparse import active_values, sparse_decode
from visae.saes.sae import SAE

__all__ = ["BatchLoss", "auxk_loss", "batch_loss"]


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
) -> BatchLoss:
    """Reconstruction, sparsity penalty and dead-feature loss of a batch of raw activations."""
    x_normal = sae.normalise(x)
    centred = x_normal - sae.b_dec
    with torch.no_grad():
        codes = sae.config.sparsity.select(sae.pre_activations(x_normal))
    values = _live_values(sae, centred, codes)
    residuals = _prefix_residuals(sae, x_normal, values, codes)
    reconstruction = residuals[-1].square().mean()
    nested = torch.stack([r.square().mean() for r in residuals]).mean()
    norms = sae.W_dec.norm(dim=1)[codes.features] if values.numel() else values
    penalty = sae.config.sparsity.penalty(values, norms, codes.n_tokens)
    auxk = auxk_alpha * auxk_loss(sae, centred.detach(), -residuals[-1].detach(), dead)
    return BatchLoss(nested + penalty + auxk, reconstruction.detach(), auxk.detach(), codes)


def _live_values(
    sae: SAE, centred: Float[Tensor, "token d_model"], codes: SparseCodes
) -> Float[Tensor, " entry"]:
    """The codes' values with gradients to the encoder and, through the pre-bias, to b_dec."""
    values = active_values(centred.detach(), sae.W_enc, sae.b_enc, codes)
    # b_dec enters every pre-activation as −⟨W_enc,i, b_dec⟩; adding this zero carries its gradient.
    shift = nn.functional.linear(sae.b_dec - sae.b_dec.detach(), sae.W_enc.detach())
    return values - shift[codes.features]


def _prefix_residuals(
    sae: SAE,
    x_normal: Float[Tensor, "token d_model"],
    values: Float[Tensor, " entry"],
    codes: SparseCodes,
) -> list[Float[Tensor, "token d_model"]]:
    """x̂' − x' for each nested prefix of the features; every prefix has b_dec once."""
    bounds = sae.config.prefixes or (sae.n_features,)
    residual = sae.b_dec - x_normal
    residuals = []
    start = 0
    for stop in bounds:
        part, part_values = _between(codes, values, start, stop)
        residual = residual + sparse_decode(part_values, sae.W_dec, part)
        residuals.append(residual)
        start = stop
    return residuals


def _between(
    codes: SparseCodes, values: Float[Tensor, " entry"], start: int, stop: int
) -> tuple[SparseCodes, Float[Tensor, " kept"]]:
    """The entries of features ``start`` to ``stop``."""
    if start == 0 and stop == codes.n_features:
        return codes, values
    inside = (codes.features >= start) & (codes.features < stop)
    shape = (codes.n_tokens, codes.n_features)
    features, tokens = codes.features[inside], codes.tokens[inside]
    return SparseCodes.from_entries(tokens, features, codes.values[inside], shape), values[inside]


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
    pre = nn.functional.linear(centred, sae.W_enc[index], sae.b_enc[index])
    kept = pre.topk(k_aux, dim=1, sorted=False)
    excited = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    rebuilt = excited @ sae.W_dec[index]
    spread = (residual - residual.mean(0)).square().sum()
    return torch.nan_to_num((rebuilt - residual).square().sum() / spread, 0.0, 0.0, 0.0)
