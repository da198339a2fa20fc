"""Reconstruction and sparsity of an SAE, in one pass over the store.

    NMSE     Σ‖x−x̂‖² / Σ‖x−x̄‖²                x̄: mean of all evaluated tokens
    cosine   mean over tokens of cos(x − x̄, x̂ − x̄), 0 where either is 0
    L0       mean number of active features per token
    density  share of tokens at which a feature is active

The mean predictor x̂ = x̄ has NMSE 1 and cosine 0. Sums are float64, a few numbers an image, so
memory does not grow with the tokens. Source: METHODS §6.

Main names: ``measure``, ``Measurement``.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from visae.evaluation.tokens import EvaluatedTokens
from visae.saes.codes import SparseCodes
from visae.saes.sae import SAE

__all__ = ["Measurement", "measure"]

_DENSE = 0.1


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Sums from which the metrics of one SAE are made."""

    squared_error: Float64[Tensor, " image"]
    """Σ‖x−x̂‖² over the tokens of each image."""
    spread: Float64[Tensor, " image"]
    """Σ‖x−x̄‖² over the tokens of each image."""
    cosine: Float64[Tensor, " image"]
    """Mean cosine of each image's tokens."""
    l0: Float64[Tensor, " image"]
    """Mean active features of each image's tokens."""
    position_error: Float64[Tensor, " position"]
    """Σ‖x−x̂‖² over the images, for each token position."""
    position_spread: Float64[Tensor, " position"]
    """Σ‖x−x̄‖² over the images, for each token position."""
    firings: Int64[Tensor, " feature"]
    """Tokens at which each feature is active."""
    l0_histogram: Int64[Tensor, " count"]
    """Tokens with 0, 1, 2, … active features."""
    image_codes: SparseCodes
    """Largest activation of each feature in each of the images asked for, in their order."""

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated."""
        return int(self.l0_histogram.sum())

    @property
    def nmse(self) -> float:
        """Σ‖x−x̂‖² / Σ‖x−x̄‖² over all tokens; NaN where all activations are equal."""
        return float(self.squared_error.sum() / self.spread.sum())

    @property
    def nmse_by_image(self) -> Float64[Tensor, " image"]:
        """The same ratio within each image."""
        return self.squared_error / self.spread

    @property
    def nmse_by_position(self) -> Float64[Tensor, " position"]:
        """The same ratio at each token position."""
        return self.position_error / self.position_spread

    @property
    def mean_l0(self) -> float:
        """Mean active features per token."""
        return float(self.l0.mean())

    @property
    def density(self) -> Float64[Tensor, " feature"]:
        """Share of tokens at which each feature is active."""
        return self.firings.double() / self.n_tokens

    @property
    def dead_share(self) -> float:
        """Share of features that are active nowhere."""
        return float((self.firings == 0).double().mean())

    @property
    def dense_share(self) -> float:
        """Share of features active at more than 10 % of tokens."""
        return float((self.density > _DENSE).double().mean())

    def l0_quantile(self, q: float) -> int:
        """The smallest number of active features that a share ``q`` of tokens does not exceed."""
        reached = self.l0_histogram.cumsum(0) >= max(1.0, q * self.n_tokens)
        return int(reached.int().argmax())


class _Part(NamedTuple):
    """What one shard adds."""

    squared_error: Float64[Tensor, "image position"]
    spread: Float64[Tensor, "image position"]
    cosine: Float64[Tensor, "image position"]
    counts: Int64[Tensor, "image position"]
    firings: Int64[Tensor, " feature"]
    image_codes: SparseCodes


@torch.no_grad()
def measure(
    sae: SAE,
    tokens: EvaluatedTokens,
    *,
    images: Bool[Tensor, " image"],
    on_images: Callable[[int], None] = lambda _done: None,
) -> Measurement:
    """Encode every token once and keep what the metrics need.

    ``images`` marks the images whose image-level codes are kept (12 bytes an active feature);
    ``on_images`` hears how many images were done after each shard.
    """
    per_image: dict[str, list[Tensor]] = {"error": [], "spread": [], "cosine": [], "l0": []}
    position_error = torch.zeros(tokens.per_image, dtype=torch.float64)
    position_spread = torch.zeros_like(position_error)
    firings = torch.zeros(sae.n_features, dtype=torch.int64)
    histogram = torch.zeros(sae.n_features + 1, dtype=torch.int64)
    kept: list[SparseCodes] = []
    for shard in tokens.shards():
        n_images = shard.activations.shape[0]
        wanted = images[shard.first_image : shard.first_image + n_images]
        part = _measure_shard(sae, shard.activations, tokens.mean, wanted)
        per_image["error"].append(part.squared_error.sum(1))
        per_image["spread"].append(part.spread.sum(1))
        per_image["cosine"].append(part.cosine.mean(1))
        per_image["l0"].append(part.counts.double().mean(1))
        position_error += part.squared_error.sum(0)
        position_spread += part.spread.sum(0)
        firings += part.firings
        histogram += torch.bincount(part.counts.flatten(), minlength=len(histogram))
        kept.append(part.image_codes)
        on_images(shard.first_image + n_images)
    columns = {name: torch.cat(parts) for name, parts in per_image.items()}
    return Measurement(
        squared_error=columns["error"],
        spread=columns["spread"],
        cosine=columns["cosine"],
        l0=columns["l0"],
        position_error=position_error,
        position_spread=position_spread,
        firings=firings,
        l0_histogram=histogram,
        image_codes=SparseCodes.join(kept),
    )


def _measure_shard(
    sae: SAE,
    activations: Float[Tensor, "image position d_model"],
    mean: Float64[Tensor, " d_model"],
    wanted: Bool[Tensor, " image"],
) -> _Part:
    n_images, n_positions, _ = activations.shape
    x = activations.flatten(0, 1).to(sae.mean.device, torch.float32)
    codes = sae.encode_sparse(x)
    centre = mean.to(x.device, torch.float32)
    rebuilt = sae.decode_sparse(codes).sub_(centre)
    centred = x - centre
    spread, length = _squares(centred), _squares(rebuilt)
    product = torch.einsum("td,td->t", centred, rebuilt).double()
    lengths = (spread * length).sqrt()
    cosine = torch.where(lengths > 0, product / lengths, torch.zeros_like(product))
    error = _squares(centred.sub_(rebuilt))
    largest = codes.max_per_image(n_positions).cpu()
    return _Part(
        squared_error=error.cpu().view(n_images, n_positions),
        spread=spread.cpu().view(n_images, n_positions),
        cosine=cosine.cpu().view(n_images, n_positions),
        counts=codes.counts.cpu().view(n_images, n_positions),
        firings=torch.bincount(codes.features, minlength=sae.n_features).cpu(),
        image_codes=largest.take(torch.nonzero(wanted).flatten()),
    )


def _squares(vectors: Float[Tensor, "token d_model"]) -> Float64[Tensor, " token"]:
    """‖v‖² of each token."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return lengths.double().square()
