"""Training losses, in normalised units; each takes one batch and one SAE.

    reconstruction   mean over tokens of ‖x̂' − x'‖² / d_model (a transcoder's: of its target)
    Matryoshka       mean of that over nested prefixes of the features (2503.17547)
    Gated            besides, that of the gate's values through a frozen decoder (2404.16014)
    AuxK             α ‖ê − e‖² / ‖e − ē‖², e the residual, ê built by dead features (2406.04093)

Source: METHODS §2, §3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from visae.errors import ConfigError
from visae.saes.codes import SparseCodes
from visae.saes.kernels.sparse import FeatureLists, active_values, nested_decode
from visae.saes.learned import AnySparsity, LearnedSparsity, learned_codes
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
    target: Float[Tensor, "token d_model"] | None = None,
    prefixes: Sequence[int] = (),
    sparsity: AnySparsity | None = None,
) -> BatchLoss:
    """Reconstruction, sparsity penalty and dead-feature loss of a batch of raw activations.

    ``penalty_share`` scales the sparsity penalty, for its warm-up. ``target`` are the raw
    activations that a transcoder must give. ``prefixes`` and ``sparsity`` are those of this batch,
    in place of the SAE's own.

    Raises:
        ConfigError: when a transcoder gets no target, or another SAE gets one.
    """
    sparsity = sae.config.sparsity if sparsity is None else sparsity
    x_normal = sae.normalise(x)
    wanted = x_normal if target is None else sae.normalise_target(target)
    _check_target(sae, target)
    centred = sae.centre(x_normal).detach()
    with torch.no_grad():
        entries = _candidates(sae, sparsity, linear(centred, sae.W_enc, sae.b_enc))
    lists = FeatureLists(entries)
    b_dec = torch.zeros_like(sae.b_dec) if sae.config.transcoder else sae.b_dec
    pre = active_values(centred, sae.W_enc, sae.b_enc, b_dec, lists)
    active = _activate(sae, sparsity, pre, entries)
    bounds = prefixes or sae.config.prefixes or (sae.n_features,)
    rebuilt = nested_decode(active.values, sae.W_dec, sae.b_dec, lists, bounds)
    nested = mse_loss(rebuilt, wanted.expand_as(rebuilt))
    if active.gate is not None:
        fixed = sae.W_dec.detach(), sae.b_dec.detach()
        gated = nested_decode(active.gate, *fixed, lists, bounds)
        nested = nested + mse_loss(gated, wanted.expand_as(gated))
    residual = wanted - rebuilt[-1].detach()
    auxk = auxk_alpha * auxk_loss(sae, centred, residual, dead)
    total = nested + penalty_share * active.penalty + auxk
    return BatchLoss(total, residual.square().mean(), auxk.detach(), active.codes)


def _check_target(sae: SAE, target: Tensor | None) -> None:
    if sae.config.transcoder and target is None:
        raise ConfigError(
            "A transcoder learns from the activations at two sites",
            where="target",
            fix="Give those at its target site too",
        )
    if target is not None and not sae.config.transcoder:
        raise ConfigError(
            "This SAE gives the activations it reads, so it has no target",
            where="target",
            fix="Give one site, or make a transcoder",
        )


class _Active(NamedTuple):
    """What a sparsity kind makes of the entries of a batch."""

    values: Float[Tensor, " entry"]
    """Feature activations, with gradients."""
    penalty: Float[Tensor, ""]
    """The kind's own term of the loss."""
    gate: Float[Tensor, " entry"] | None
    """Values that must reconstruct through a frozen decoder."""
    codes: SparseCodes
    """The active entries, without gradient."""


def _candidates(
    sae: SAE, sparsity: AnySparsity, pre: Float[Tensor, "token feature"]
) -> SparseCodes:
    """The entries of a training batch that the loss needs, with their pre-activations."""
    if isinstance(sparsity, LearnedSparsity):
        return sparsity.candidates(pre, sae.vectors)
    return sparsity.select(pre)


def _activate(
    sae: SAE, sparsity: AnySparsity, pre: Float[Tensor, " entry"], entries: SparseCodes
) -> _Active:
    n_tokens = entries.n_tokens
    # index_select, not indexing: the sums of its gradient have a fixed order
    norms = sae.W_dec.norm(dim=1).index_select(0, entries.features)
    if not isinstance(sparsity, LearnedSparsity):
        return _Active(pre, sparsity.penalty(pre, norms, n_tokens), None, entries)
    own = {name: v.index_select(0, entries.features) for name, v in sae.vectors.items()}
    values = sparsity.activate(pre, own)
    penalty = sparsity.penalty(pre, own, norms, n_tokens)
    codes = learned_codes(entries, values.detach())
    return _Active(values, penalty, sparsity.gate_values(pre), codes)


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
