"""An even sample of each feature's entries that fits in memory: all of them when they do.

Whether an entry stays depends only on a hash of its place and the share of its feature's entries
that may stay, so the sample is the same for every order and division of the work.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt64
from torch import Tensor

__all__ = ["FeatureSample", "join_samples", "keep_shares", "places_hash", "thin"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSample:
    """Some entries of the codes."""

    features: Int64[Tensor, " entry"]
    """Feature of each."""
    rows: Int64[Tensor, " entry"]
    """Token or image of each, counted over the whole index."""
    values: Tensor
    """Value of each, float32."""


def keep_shares(counts: Int64[Tensor, " feature"], *, budget: int) -> Float64[Tensor, " feature"]:
    """The share of each feature's entries to keep so that all together are about ``budget``.

    1 for all when everything fits; otherwise no feature keeps more than an equal part.
    """
    if int(counts.sum()) <= budget:
        return torch.ones(counts.shape, dtype=torch.float64)
    part = budget / counts.shape[0]
    return (part / counts.clamp_min(1).double()).clamp_max(1.0)


def thin(sample: FeatureSample, shares: Float64[Tensor, " feature"], *, seed: int) -> FeatureSample:
    """The entries that stay when each feature keeps its share."""
    if bool((shares >= 1.0).all()):
        return sample
    kept = torch.from_numpy(_kept(sample, shares, seed))
    return FeatureSample(
        features=sample.features[kept], rows=sample.rows[kept], values=sample.values[kept]
    )


def join_samples(parts: list[FeatureSample]) -> FeatureSample:
    """One sample of all parts, in order."""
    return FeatureSample(
        features=torch.cat([part.features for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        values=torch.cat([part.values for part in parts]),
    )


def places_hash(
    features: Int64[np.ndarray, " entry"], rows: Int64[np.ndarray, " entry"], *, seed: int
) -> UInt64[np.ndarray, " entry"]:
    """A pseudo-random number for each (feature, row), by the finaliser of SplitMix64."""
    mask = np.uint64(2**64 - 1)
    x = features.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= rows.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    x += np.uint64((seed * 0x8CB92BA72F3D8DD7 + 0x2545F4914F6CDD1D) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & mask
    return x ^ (x >> np.uint64(31))


def _kept(
    sample: FeatureSample, shares: Float64[Tensor, " feature"], seed: int
) -> Bool[np.ndarray, " entry"]:
    hashes = places_hash(sample.features.numpy(), sample.rows.numpy(), seed=seed)
    fraction = (hashes >> np.uint64(11)).astype(np.float64) / 2**53
    kept: np.ndarray = fraction < shares.numpy()[sample.features.numpy()]
    return kept
