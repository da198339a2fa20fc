"""Mean and scale of activations, by which an SAE normalises its input."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from visae.activations.statistics import SiteStatistics
from visae.errors import StoreError

__all__ = ["Normalisation"]

_SMALLEST_SCALE = 1e-7  # of the activations' size: below it, what differs is rounding


class Normalisation(NamedTuple):
    """What an SAE subtracts from its input and divides it by, and what it was measured on."""

    mean: Float64[Tensor, " d_model"]
    """Mean activation."""
    scale: float
    """The scalar s that makes the mean squared norm of (x − mean)/s equal to d_model."""
    n_tokens: int
    """Tokens that they were measured on."""

    @classmethod
    def of_statistics(cls, statistics: SiteStatistics) -> "Normalisation":
        """That of a store's statistics."""
        return cls(statistics.mean, statistics.scale, statistics.n_tokens)

    @classmethod
    def of_tokens(cls, batches: Iterable[Float[Tensor, "_ d_model"]]) -> "Normalisation":
        """That of some tokens, in float64.

        Raises:
            StoreError: when there is no token, or all are equal.
        """
        n_tokens, shift = 0, torch.zeros(())
        total, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for batch in (found for found in batches if len(found)):
            values = batch.double()
            shift = values.mean(0) if n_tokens == 0 else shift
            values = values - shift
            n_tokens += len(values)
            total = total + values.sum(0)
            squares = squares + values.square().sum(0)
        if n_tokens == 0:
            raise StoreError("There are no tokens to measure", fix="Select more, or other images")
        mean = total / n_tokens
        scale = float((squares / n_tokens - mean.square()).clamp_min(0.0).mean().sqrt())
        mean = mean + shift
        if not scale > _SMALLEST_SCALE * float(mean.square().mean().sqrt()):
            raise StoreError(
                "All these activations are equal, or not all are finite",
                fix="Choose another site or other images, or look at the store with visae doctor",
            )
        return cls(mean, scale, n_tokens)
