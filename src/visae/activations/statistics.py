"""Statistics of a site's activations, accumulated in float64 while they pass by.

Recording takes ``SiteStatistics.of`` each batch, adds batches to shards and shards to the store,
always in the same order, so that an interrupted and resumed recording has the same statistics bit
for bit. Special and patch tokens are kept apart, so that every token policy has its own.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from visae.errors import ConfigError, StoreError
from visae.models.layout import Layout, TokenPolicy

__all__ = ["Eigenpairs", "SiteStatistics", "add_up", "token_kinds"]

_SMALLEST_SCALE = 1e-7  # of the activations' size: below it, what differs is rounding
_NORM_EDGES = torch.logspace(-4, 6, 1001, dtype=torch.float64)


def token_kinds(layout: Layout, kept: TokenPolicy) -> dict[str, slice]:
    """Where the special tokens and the patches are among the tokens that a policy keeps."""
    kinds = {}
    if layout.n_special and kept != "patches":
        kinds["special"] = layout.within("special", kept)
    if kept != "special":
        kinds["patches"] = layout.within("patches", kept)
    return kinds


class Eigenpairs(NamedTuple):
    """The directions along which activations vary most."""

    values: Float64[Tensor, " pair"]
    """Variance along each direction, in descending order."""
    vectors: Float64[Tensor, "pair d_model"]
    """Unit vectors, one a row; the largest entry of each is positive."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What is known of the activations at one site, over some token positions of all images."""

    n_images: int
    """Images recorded."""
    position_sum: Float64[Tensor, "token d_model"]
    """Sum over images, for each token position."""
    scatter: Float64[Tensor, "d_model d_model"]
    """Σ (x − mean)(x − mean)ᵀ over all tokens."""
    norm_histogram: Float64[Tensor, " bin"]
    """Tokens by norm, in 1000 logarithmic bins from 1e-4 to 1e6."""
    rounding_square_sum: Float64[Tensor, " token"]
    """Σ‖stored − computed‖² over images, for each token position."""

    @classmethod
    def of(
        cls,
        activations: Float[Tensor, "image token d_model"],
        *,
        rounding: Float64[Tensor, " token"] | None = None,
    ) -> "SiteStatistics":
        """The statistics of some images, on the device where their activations are.

        Sums and variances are exact to float64. The products of different dimensions are those of
        centred activations in float32, which is the precision of the model itself.

        Args:
            activations: What is stored.
            rounding: Squared distance between these and what the model gave, summed over the
                images for each position; without it, none.
        """
        values = activations.to(torch.float64, copy=True)
        position_sum = values.sum(0)
        norms = torch.linalg.vector_norm(values, dim=2)
        values -= position_sum.mean(0) / max(1, len(values))
        single = values.flatten(0, 1).float()
        scatter = (single.T @ single).double()
        scatter.diagonal().copy_(values.square_().sum(0).sum(0))
        return cls(
            n_images=len(values),
            position_sum=position_sum,
            scatter=scatter,
            norm_histogram=_histogram(norms.flatten()),
            rounding_square_sum=norms.new_zeros(norms.shape[1]) if rounding is None else rounding,
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> "SiteStatistics":
        """What ``tensors`` gave, read back."""
        return cls(
            n_images=int(tensors[prefix + "n_images"]),
            position_sum=tensors[prefix + "position_sum"],
            scatter=tensors[prefix + "scatter"],
            norm_histogram=tensors[prefix + "norm_histogram"],
            rounding_square_sum=tensors[prefix + "rounding_square_sum"],
        )

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every field as a tensor of its own, on the CPU."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["n_images"] = torch.tensor(self.n_images)
        return {prefix + name: tensor.cpu() for name, tensor in plain.items()}

    def plus(self, other: "SiteStatistics") -> "SiteStatistics":
        """Those of other images too, at the same token positions."""
        return SiteStatistics(
            n_images=self.n_images + other.n_images,
            position_sum=self.position_sum + other.position_sum,
            scatter=self._joint_scatter(other),
            norm_histogram=self.norm_histogram + other.norm_histogram,
            rounding_square_sum=self.rounding_square_sum + other.rounding_square_sum,
        )

    def beside(self, other: "SiteStatistics") -> "SiteStatistics":
        """Those of other token positions too, which follow these, of the same images."""
        return SiteStatistics(
            n_images=self.n_images,
            position_sum=torch.cat([self.position_sum, other.position_sum]),
            scatter=self._joint_scatter(other),
            norm_histogram=self.norm_histogram + other.norm_histogram,
            rounding_square_sum=torch.cat([self.rounding_square_sum, other.rounding_square_sum]),
        )

    def _joint_scatter(self, other: "SiteStatistics") -> Float64[Tensor, "d_model d_model"]:
        """A + B + (n·m / (n + m)) δδᵀ, δ being the difference of the means (Chan et al. 1983)."""
        if not self.n_tokens or not other.n_tokens:
            return other.scatter if not self.n_tokens else self.scatter
        weight = self.n_tokens * other.n_tokens / (self.n_tokens + other.n_tokens)
        step = other.mean - self.mean
        return (self.scatter + other.scatter).addr_(step, step, alpha=weight)

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
        return self.scatter.diagonal() / self.n_tokens

    @property
    def covariance(self) -> Float64[Tensor, "d_model d_model"]:
        """Covariance of the dimensions over all tokens."""
        return self.scatter / self.n_tokens

    @property
    def mean_square(self) -> Float64[Tensor, " d_model"]:
        """Mean square of each dimension."""
        return self.variance + self.mean.square()

    @property
    def scale(self) -> float:
        """The scalar s that makes the mean squared norm of (x − mean)/s equal to d_model.

        Raises:
            StoreError: when all activations are equal.
        """
        scale = float(self.variance.mean().sqrt())
        size = float(self.mean_square.mean().sqrt())
        if scale <= _SMALLEST_SCALE * size:
            raise StoreError(
                "All activations of this site are equal",
                fix="Record another site, or other images",
            )
        return scale

    @property
    def rounding_error(self) -> float:
        """Root of Σ‖stored − computed‖² / Σ‖stored − mean‖², what the number format costs."""
        spread = float(self.scatter.diagonal().sum())
        return float(self.rounding_square_sum.sum() / spread) ** 0.5 if spread > 0 else 0.0

    @property
    def outlier_dimensions(self) -> list[int]:
        """Dimensions whose mean square is more than 50 times the median one."""
        power = self.mean_square
        return [int(i) for i in torch.nonzero(power > 50 * power.median()).flatten()]

    def eigenpairs(self, n_pairs: int) -> Eigenpairs:
        """The leading eigenvalues and eigenvectors of the covariance (all are computed: O(d³)).

        Raises:
            ConfigError: when more are wanted than there are dimensions, or none.
        """
        d_model = len(self.scatter)
        if not 1 <= n_pairs <= d_model:
            raise ConfigError(
                f"There are {d_model} eigenpairs, not {n_pairs}",
                fix=f"Ask for 1 to {d_model}",
            )
        values, columns = torch.linalg.eigh(self.covariance)
        vectors = columns.T.flip(0)[:n_pairs]
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return Eigenpairs(values.flip(0)[:n_pairs].clamp_min(0.0), vectors * largest.sign())

    def norm_quantile(self, q: float) -> float:
        """Quantile of the token norms, to the width of a histogram bin (2.3 %)."""
        cumulative = self.norm_histogram.cumsum(0)
        rank = max(1.0, q * float(cumulative[-1]))  # at least the smallest norm
        target = torch.tensor(rank, dtype=torch.float64)
        index = int(torch.searchsorted(cumulative, target).clamp(max=len(cumulative) - 1))
        return float(_NORM_EDGES[index + 1])


def add_up(parts: Iterable[SiteStatistics]) -> SiteStatistics:
    """The statistics of all images, from those of some each, in order.

    Raises:
        StoreError: when there are none.
    """
    found = list(parts)
    if not found:
        raise StoreError("There are no shards to take statistics of", fix="Record images first")
    return functools.reduce(SiteStatistics.plus, found)


def _histogram(norms: Float64[Tensor, " token"]) -> Float64[Tensor, " bin"]:
    """Tokens in each bin; norms beyond the edges, and what is no number, fall into the ends."""
    inner = _NORM_EDGES[1:-1].to(norms.device)
    bins = torch.bucketize(norms, inner, right=True)
    return norms.new_zeros(len(inner) + 1).scatter_add_(0, bins, torch.ones_like(norms))
