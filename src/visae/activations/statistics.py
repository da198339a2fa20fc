"""Statistics of a site's activations, accumulated in float64 while they pass by.

Sums of shards are added in shard order, so that an interrupted and resumed recording has the
same statistics bit for bit.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from visae.errors import StoreError

__all__ = ["SiteStatistics", "partial_sums"]

_SMALLEST_SCALE = 1e-7  # of the activations' size: below it, what differs is rounding
_NORM_EDGES = torch.logspace(-4, 6, 1001, dtype=torch.float64)


def partial_sums(
    activations: Float[Tensor, "image token d_model"],
    *,
    rounding: Float64[Tensor, " token"] | None = None,
) -> dict[str, Float64[Tensor, "..."]]:
    """Sums over the tokens of a shard, from which every statistic is made.

    ``rounding`` is the squared distance between these activations and those that the model gave,
    summed over the images for each token position; without it, none.
    """
    values = activations.double()
    flat = values.flatten(0, 1)
    norms = flat.norm(dim=1).clamp(_NORM_EDGES[0], _NORM_EDGES[-1])
    return {
        "n_images": torch.tensor([float(values.shape[0])], dtype=torch.float64),
        "position_sum": values.sum(0),
        "position_square_sum": values.square().sum(0),
        "norm_histogram": torch.histogram(norms, _NORM_EDGES).hist,
        "rounding_square_sum": values.new_zeros(values.shape[1]) if rounding is None else rounding,
    }


@dataclasses.dataclass(frozen=True)
class SiteStatistics:
    """What is known of the activations at one site, over all recorded tokens."""

    n_images: int
    """Images recorded."""
    position_sum: Float64[Tensor, "token d_model"]
    """Sum over images, for each kept token position."""
    position_square_sum: Float64[Tensor, "token d_model"]
    """Sum of squares over images, for each kept token position."""
    norm_histogram: Float64[Tensor, " bin"]
    """Tokens by norm, in 1000 logarithmic bins from 1e-4 to 1e6."""
    rounding_square_sum: Float64[Tensor, " token"]
    """Σ‖stored − computed‖² over images, for each kept token position."""

    @classmethod
    def merge(cls, shards: Iterable[Mapping[str, Tensor]]) -> "SiteStatistics":
        """Add the partial sums of shards, in order.

        Raises:
            StoreError: when there is no shard.
        """
        parts = list(shards)
        if not parts:
            raise StoreError("There are no shards to take statistics of", fix="Record images first")
        total = {k: functools.reduce(torch.add, (part[k] for part in parts)) for k in parts[0]}
        return cls(
            n_images=int(total["n_images"].item()),
            position_sum=total["position_sum"],
            position_square_sum=total["position_square_sum"],
            norm_histogram=total["norm_histogram"],
            rounding_square_sum=total["rounding_square_sum"],
        )

    def at(self, positions: slice) -> "SiteStatistics":
        """The statistics of some token positions alone (norms stay those of all of them)."""
        return dataclasses.replace(
            self,
            position_sum=self.position_sum[positions],
            position_square_sum=self.position_square_sum[positions],
            rounding_square_sum=self.rounding_square_sum[positions],
        )

    @property
    def square_sum(self) -> Float64[Tensor, " d_model"]:
        """Sum of squares over all tokens."""
        return self.position_square_sum.sum(0)

    @property
    def n_tokens(self) -> int:
        """Tokens recorded."""
        return self.n_images * self.position_sum.shape[0]

    @property
    def mean(self) -> Float64[Tensor, " d_model"]:
        """Mean activation."""
        return self.position_sum.sum(0) / self.n_tokens

    @property
    def position_mean(self) -> Float64[Tensor, "token d_model"]:
        """Mean activation at each kept token position."""
        return self.position_sum / self.n_images

    @property
    def variance(self) -> Float64[Tensor, " d_model"]:
        """Variance of each dimension."""
        return (self.square_sum / self.n_tokens - self.mean.square()).clamp_min(0.0)

    @property
    def scale(self) -> float:
        """The scalar s that makes the mean squared norm of (x − mean)/s equal to d_model.

        Raises:
            StoreError: when all activations are equal.
        """
        scale = float(self.variance.mean().sqrt())
        size = float(self.square_sum.mean() / self.n_tokens) ** 0.5
        if scale <= _SMALLEST_SCALE * size:
            raise StoreError(
                "All activations of this site are equal",
                fix="Record another site, or other images",
            )
        return scale

    @property
    def rounding_error(self) -> float:
        """Root of Σ‖stored − computed‖² / Σ‖stored − mean‖², what the number format costs."""
        spread = float(self.variance.sum()) * self.n_tokens
        return float(self.rounding_square_sum.sum() / spread) ** 0.5 if spread > 0 else 0.0

    @property
    def outlier_dimensions(self) -> list[int]:
        """Dimensions whose mean square is more than 50 times the median one."""
        power = self.square_sum / self.n_tokens
        return [int(i) for i in torch.nonzero(power > 50 * power.median()).flatten()]

    def norm_quantile(self, q: float) -> float:
        """Quantile of the token norms, to the width of a histogram bin (2.3 %)."""
        cumulative = self.norm_histogram.cumsum(0)
        rank = max(1.0, q * float(cumulative[-1]))  # at least the smallest norm
        target = torch.tensor(rank, dtype=torch.float64)
        index = int(torch.searchsorted(cumulative, target).clamp(max=len(cumulative) - 1))
        return float(_NORM_EDGES[index + 1])
