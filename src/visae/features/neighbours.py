"""Features that write alike: nearest decoder directions by cosine."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["N_NEIGHBOURS", "nearest_features"]

N_NEIGHBOURS = 5
"""Neighbours kept for each feature."""

_BLOCK = 1024


def nearest_features(
    w_dec: Float[Tensor, "feature d_model"],
) -> tuple[Int64[Tensor, "feature rank"], Float[Tensor, "feature rank"]]:
    """For each feature the others of largest decoder cosine, and these cosines, best first.

    Padded with −1 and 0 where there are fewer than ``N_NEIGHBOURS`` other features.
    """
    unit = torch.nn.functional.normalize(w_dec.detach().float().cpu(), dim=1)
    n_features = unit.shape[0]
    n_found = min(N_NEIGHBOURS, n_features - 1)
    features = torch.full((n_features, N_NEIGHBOURS), -1, dtype=torch.int64)
    cosines = torch.zeros(n_features, N_NEIGHBOURS)
    for start in range(0, n_features, _BLOCK):
        stop = min(start + _BLOCK, n_features)
        block = unit[start:stop] @ unit.T
        block[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        best = block.topk(n_found, dim=1)
        features[start:stop, :n_found] = best.indices
        cosines[start:stop, :n_found] = best.values
    return features, cosines
