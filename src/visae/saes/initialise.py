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
from visae.saes.codes import SparseCodes
from visae.saes.kernels.sparse import sparse_decode
from visae.saes.sae import SAE

__all__ = ["Rows", "initialise", "random_rows"]

Rows = Literal["mixed", "data", "random"]

_SCALING_TOKENS = 4096

_DATA_SHARE: dict[Rows, float] = {"mixed": 0.8, "data": 1.0, "random": 0.0}


@torch.no_grad()
def initialise(
    sae: SAE, sample: Float[Tensor, "token d_model"], *, seed: int, rows: Rows = "mixed"
) -> None:
    """Set the weights from a sample of raw activations; μ and s must be set before.

    ``rows`` says what the decoder rows are made of: data and noise, data alone, or noise alone.
    Each row is made of another token where the sample holds as many as there are features.

    Raises:
        StoreError: when the sample holds NaN or infinite values.
    """
    if not torch.isfinite(sample).all():
        raise StoreError("The activations hold NaN or infinite values", fix="Run visae doctor")
    generator = torch.Generator().manual_seed(seed)
    x_normal = sae.normalise(sample)
    n_rounds = -(-sae.n_features // len(x_normal))
    rounds = [torch.randperm(len(x_normal), generator=generator) for _ in range(n_rounds)]
    chosen = torch.cat(rounds)[: sae.n_features].to(x_normal.device)
    data = nn.functional.normalize(x_normal[chosen], dim=1)
    noise = random_rows(sae.n_features, sae.d_model, generator).to(data.device)
    share = _DATA_SHARE[rows]
    sae.W_dec.copy_(nn.functional.normalize(share * data + (1 - share) * noise, dim=1))
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    sae.W_enc.mul_(_best_multiple(sae, x_normal[:_SCALING_TOKENS]))


def random_rows(
    n_rows: int, d_model: int, generator: torch.Generator
) -> Float[Tensor, "row d_model"]:
    """Unit vectors in uniformly random directions."""
    return nn.functional.normalize(torch.randn(n_rows, d_model, generator=generator), dim=1)


def _best_multiple(sae: SAE, x_normal: Float[Tensor, "token d_model"]) -> float:
    """The c that minimises ‖c·x̂' − x'‖² with the present weights."""
    codes: SparseCodes = sae.config.sparsity.select(sae.pre_activations(x_normal))
    rebuilt = sparse_decode(codes.values, sae.W_dec, codes)
    energy = float(rebuilt.square().sum())
    return float((rebuilt * x_normal).sum()) / energy if energy > 0 else 1.0
