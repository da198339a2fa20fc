"""Quantiles and histograms of every feature's positive activations."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from visae.features.thinning import FeatureSample

__all__ = ["N_BINS", "feature_histograms", "feature_quantiles"]

N_BINS = 32
"""Bins of a feature's histogram, of equal width from 0 to its maximum."""


def feature_quantiles(
    sample: FeatureSample, quantiles: tuple[float, ...], *, n_features: int
) -> Float64[np.ndarray, "feature quantile"]:
    """Quantiles of each feature's values, linear between order statistics; 0 without values."""
    values = _sorted_within_features(sample).astype(np.float64)
    counts = torch.bincount(sample.features, minlength=n_features).numpy()
    starts = counts.cumsum() - counts
    result = np.zeros((n_features, len(quantiles)))
    alive = counts > 0
    for column, quantile in enumerate(quantiles):
        place = quantile * (counts[alive] - 1)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, counts[alive] - 1)
        low, high = values[starts[alive] + below], values[starts[alive] + above]
        result[alive, column] = low + (high - low) * (place - below)
    return result


def _sorted_within_features(sample: FeatureSample) -> Float32[np.ndarray, " entry"]:
    """The values, feature after feature, each ascending.

    One sort does both: the bits of positive floats ascend with their value, so that (feature,
    bits) is one integer.
    """
    bits = sample.values.numpy().view(np.uint32).astype(np.uint64)
    keys = (sample.features.numpy().astype(np.uint64) << np.uint64(32)) | bits
    keys.sort()
    return keys.astype(np.uint32).view(np.float32)


def feature_histograms(
    features: Int64[Tensor, " entry"],
    values: Float[Tensor, " entry"],
    largest: Float[Tensor, " feature"],
) -> Int64[Tensor, "feature bin"]:
    """How many values of each feature fall into each of ``N_BINS`` bins from 0 to its maximum."""
    n_features = largest.shape[0]
    place = values.double() / largest[features].double() * N_BINS
    bins = place.long().clamp_max(N_BINS - 1)
    flat = torch.bincount(features * N_BINS + bins, minlength=n_features * N_BINS)
    return flat.view(n_features, N_BINS)
