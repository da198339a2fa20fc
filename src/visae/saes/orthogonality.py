"""A penalty on features that point the same way, on request (OrtSAE, 2509.22033)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["orthogonality_loss"]

_CHUNK_ROWS = 1024


def orthogonality_loss(
    w_dec: Float[Tensor, "feature d_model"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Mean over features of max_j cos²(W_dec,i, W_dec,j), j ≠ i in the same random chunk.

    The features are divided at random into chunks of at most 1 024, anew for each batch, so the
    cost is 2 · n_features · 1 024 · d_model operations and not quadratic in the features.
    """
    n_features = w_dec.shape[0]
    n_chunks = -(-n_features // _CHUNK_ROWS)
    order = torch.randperm(n_features, generator=generator).to(w_dec.device)
    rows = nn.functional.normalize(w_dec, dim=1)
    total = w_dec.new_zeros(())
    for chunk in order.tensor_split(n_chunks):
        chosen = rows.index_select(0, chunk)
        # squaring after the product of a chunk with itself; the diagonal is no pair
        squares = (chosen @ chosen.T).square().fill_diagonal_(0.0)
        total = total + squares.amax(dim=1).sum()
    return total / n_features
