"""Where training starts: decoder rows from data, encoder rows parallel to them.

W_dec rows are 0.8 · (x_i − mean) + 0.2 · random, made unit (or, for the controls, one of the two
alone); W_enc = c · W_dec with c chosen so that x̂' is the best multiple of itself on the first
tokens; b_enc = b_dec = 0, for the mean is in μ. Source: METHODS §4.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visae.errors import StoreError
from visae.saes.archetypal import Archetypes
from visae.saes.kernels.sparse import sparse_decode
from visae.saes.learned import LearnedSparsity
from visae.saes.sae import SAE

__all__ = ["Rows", "initialise", "random_rows"]

Rows = Literal["mixed", "data", "random"]

_SCALING_TOKENS = 4096

_DATA_SHARE: dict[Rows, float] = {"mixed": 0.8, "data": 1.0, "random": 0.0}


@torch.no_grad()
def initialise(
    sae: SAE,
    sample: Float[Tensor, "token d_model"],
    *,
    seed: int,
    rows: Rows = "mixed",
    target: Float[Tensor, "token d_model"] | None = None,
    archetypes: Archetypes | None = None,
) -> None:
    """Set the weights from a sample of raw activations; μ and s must be set before.

    ``rows`` says what the decoder rows are made of: data and noise, data alone, or noise alone;
    with ``archetypes``, their mixtures. Each row is made of another token where the sample holds as
    many as there are features. A transcoder's decoder row is made of a token at the ``target``
    site, and its encoder row of the same token at the other.

    Raises:
        StoreError: when the sample holds NaN or infinite values.
        ConfigError: when the sample is too small for the archetypes.
    """
    _check_finite(sample if target is None else torch.cat([sample, target]))
    x_normal = sae.normalise(sample)
    wanted = x_normal if target is None else sae.normalise_target(target)
    if archetypes is None:
        sae.W_dec.copy_(_token_rows(wanted, sae.n_features, rows, seed))
    else:
        archetypes.start(wanted, seed=seed)
        sae.W_dec.copy_(archetypes.rows())
    same = target is None
    sae.W_enc.copy_(sae.W_dec if same else _token_rows(x_normal, sae.n_features, rows, seed))
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    first = x_normal[:_SCALING_TOKENS]
    _calibrate(sae, first)
    sae.W_enc.mul_(_best_multiple(sae, first, wanted[:_SCALING_TOKENS]))
    _calibrate(sae, first)


def _check_finite(sample: Float[Tensor, "token d_model"]) -> None:
    if not torch.isfinite(sample).all():
        raise StoreError("The activations hold NaN or infinite values", fix="Run visae doctor")


def _token_rows(
    x_normal: Float[Tensor, "token d_model"], n_rows: int, rows: Rows, seed: int
) -> Float[Tensor, "row d_model"]:
    """Unit rows of tokens and noise; one seed gives the same tokens and noise every time."""
    generator = torch.Generator().manual_seed(seed)
    n_rounds = -(-n_rows // len(x_normal))
    rounds = [torch.randperm(len(x_normal), generator=generator) for _ in range(n_rounds)]
    chosen = torch.cat(rounds)[:n_rows].to(x_normal.device)
    data = nn.functional.normalize(x_normal[chosen], dim=1)
    noise = random_rows(n_rows, x_normal.shape[1], generator).to(data.device)
    share = _DATA_SHARE[rows]
    return nn.functional.normalize(share * data + (1 - share) * noise, dim=1)


def random_rows(
    n_rows: int, d_model: int, generator: torch.Generator
) -> Float[Tensor, "row d_model"]:
    """Unit vectors in uniformly random directions."""
    return nn.functional.normalize(torch.randn(n_rows, d_model, generator=generator), dim=1)


def _calibrate(sae: SAE, x_normal: Float[Tensor, "token d_model"]) -> None:
    """Start what the sparsity kind learns, by the pre-activations of the present weights."""
    if isinstance(sae.config.sparsity, LearnedSparsity):
        for name, value in sae.config.sparsity.calibrate(sae.pre_activations(x_normal)).items():
            sae.learned[name].fill_(value)


def _best_multiple(
    sae: SAE,
    x_normal: Float[Tensor, "token d_model"],
    wanted: Float[Tensor, "token d_model"],
) -> float:
    """The c that minimises ‖c·x̂' − wanted‖² with the present weights."""
    codes = sae.select_batch(sae.pre_activations(x_normal))
    rebuilt = sparse_decode(codes.values, sae.W_dec, codes)
    energy = float(rebuilt.square().sum())
    return float((rebuilt * wanted).sum()) / energy if energy > 0 else 1.0
