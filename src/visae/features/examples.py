"""Which images stand for a feature: the strongest, three bands below them, and any active one.

``top`` holds the images of largest maximum. The other images on which the feature fires are ranked
by their maximum and cut into three equal parts, ``upper``, ``middle`` and ``low``; each band holds
images drawn from its part. ``random_active`` is drawn from all images on which the feature fires,
and so shows what it is like when nobody chooses. An image that occurs twice counts once.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from visae.features.record import BANDS, Band
from visae.features.thinning import FeatureSample, places_hash

__all__ = ["BandTable", "choose_examples", "merge_strongest", "strongest"]

_RANDOM_SEED_STEP = 1_000_003


@dataclasses.dataclass(frozen=True, kw_only=True)
class BandTable:
    """The examples of one band, for every feature, strongest first."""

    images: Int64[Tensor, "feature rank"]
    """Image rows, −1 where there are fewer."""
    maxima: Float32[Tensor, "feature rank"]
    """The feature's largest activation on each, 0 where there are fewer."""

    @classmethod
    def empty(cls, *, n_features: int, n_kept: int) -> "BandTable":
        """No examples yet."""
        images = torch.full((n_features, n_kept), -1, dtype=torch.int64)
        return cls(images=images, maxima=torch.zeros(n_features, n_kept))


def strongest(sample: FeatureSample, *, n_features: int, n_kept: int) -> BandTable:
    """The entries of largest value of each feature; of equal ones the earlier image."""
    order = np.lexsort((sample.rows.numpy(), -sample.values.numpy(), sample.features.numpy()))
    return _first_of_each(sample, order, n_features=n_features, n_kept=n_kept)


def merge_strongest(earlier: BandTable, later: BandTable) -> BandTable:
    """The strongest images of two parts; of equal ones those of the earlier part come first."""
    maxima = torch.cat([earlier.maxima, later.maxima], dim=1)
    images = torch.cat([earlier.images, later.images], dim=1)
    order = torch.argsort(maxima, dim=1, descending=True, stable=True)
    order = order[:, : earlier.images.shape[1]]
    return BandTable(images=images.gather(1, order), maxima=maxima.gather(1, order))


def choose_examples(top: BandTable, sample: FeatureSample, *, seed: int) -> dict[Band, BandTable]:
    """The examples of every band, the same for one seed.

    Args:
        top: The strongest images of each feature.
        sample: Image maxima from which the other bands are drawn, each image once.
        seed: Changes what is drawn.
    """
    n_features, n_kept = top.images.shape
    bands: dict[Band, BandTable] = {"top": top}
    third = _third_of_rest(sample, top)
    for number, band in enumerate(BANDS[1:4]):
        part = _only(sample, third == number)
        bands[band] = _draw(part, n_features=n_features, n_kept=n_kept, seed=seed)
    drawn = _draw(sample, n_features=n_features, n_kept=n_kept, seed=seed + _RANDOM_SEED_STEP)
    bands["random_active"] = drawn
    return bands


def _third_of_rest(sample: FeatureSample, top: BandTable) -> Int64[np.ndarray, " entry"]:
    """For each entry 0, 1 or 2 from the strongest third of its feature's to the weakest.

    Entries among the feature's top images have −1 and are not ranked.
    """
    features, rows, values = (
        sample.features.numpy(),
        sample.rows.numpy(),
        sample.values.numpy(),
    )
    is_rest = ~(top.images[sample.features] == sample.rows.unsqueeze(1)).any(1).numpy()
    counts = np.bincount(features[is_rest], minlength=top.images.shape[0])
    order = np.lexsort((rows, -values, features))
    order = order[is_rest[order]]
    rank = _rank_within(features[order])
    third: np.ndarray = np.full(features.shape, -1, dtype=np.int64)
    third[order] = rank * 3 // np.maximum(counts[features[order]], 1)
    return third


def _draw(sample: FeatureSample, *, n_features: int, n_kept: int, seed: int) -> BandTable:
    """Up to ``n_kept`` entries of each feature at random, strongest first."""
    features, rows = sample.features.numpy(), sample.rows.numpy()
    order = np.lexsort((places_hash(features, rows, seed=seed), features))
    drawn = order[_rank_within(features[order]) < n_kept]
    by_strength = np.lexsort((rows[drawn], -sample.values.numpy()[drawn], features[drawn]))
    return _first_of_each(sample, drawn[by_strength], n_features=n_features, n_kept=n_kept)


def _first_of_each(
    sample: FeatureSample,
    order: Int64[np.ndarray, " chosen"],
    *,
    n_features: int,
    n_kept: int,
) -> BandTable:
    """The first entries of each feature in an order that keeps features together."""
    features = sample.features.numpy()[order]
    rank = _rank_within(features)
    first = rank < n_kept
    table = BandTable.empty(n_features=n_features, n_kept=n_kept)
    place = torch.from_numpy(features[first]), torch.from_numpy(rank[first])
    chosen = torch.from_numpy(order[first])
    table.images[place] = sample.rows[chosen]
    table.maxima[place] = sample.values[chosen]
    return table


def _rank_within(sorted_features: Int64[np.ndarray, " entry"]) -> Int64[np.ndarray, " entry"]:
    """Position of each entry among those of its feature."""
    starts = np.searchsorted(sorted_features, sorted_features, side="left")
    rank: np.ndarray = np.arange(len(sorted_features)) - starts
    return rank


def _only(sample: FeatureSample, keep: Bool[np.ndarray, " entry"]) -> FeatureSample:
    kept = torch.from_numpy(keep)
    return FeatureSample(
        features=sample.features[kept], rows=sample.rows[kept], values=sample.values[kept]
    )
