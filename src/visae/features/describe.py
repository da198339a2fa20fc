"""From codes on disk to the statistics and examples of every feature, in two passes.

The first pass sums exactly and keeps the strongest images; the second counts the histograms and
takes the sample that quantiles and the other examples come from. The sample holds every activation
up to 32 million of them, and every image maximum up to 8 million; beyond that an even share of
each feature's (``visae.features.thinning``), so memory does not grow with the number of images.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from visae.features.codes_files import read_shards
from visae.features.examples import BandTable, choose_examples, merge_strongest, strongest
from visae.features.neighbours import nearest_features
from visae.features.places import TokenPlaces
from visae.features.quantiles import N_BINS, feature_histograms, feature_quantiles
from visae.features.record import Band, IndexRecord
from visae.features.statistics import (
    border_lift,
    class_associations,
    flags,
    label_entropy,
    position_r2,
    special_share,
)
from visae.features.sums import FeatureSums
from visae.features.thinning import FeatureSample, join_samples, keep_shares, thin
from visae.images.catalog import ImageTable
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.codes import SparseCodes

__all__ = ["describe"]

_MOST_VALUES = 2**25
_MOST_IMAGE_MAXIMA = 2**23
_QUANTILES = (0.5, 0.9, 0.99)


class _Part(NamedTuple):
    """The codes of one file, and where its images are in the index."""

    codes: SparseCodes
    image_max: SparseCodes
    first_image: int


class _Sampled(NamedTuple):
    """What the second pass takes from the codes."""

    values: FeatureSample
    image_maxima: FeatureSample
    histograms: Int64[Tensor, "feature bin"]


def describe(
    folder: Path,
    record: IndexRecord,
    images: ImageTable,
    w_dec: Float[Tensor, "feature d_model"],
    *,
    progress: ProgressCallback = silent,
) -> tuple[dict[str, Any], dict[Band, BandTable]]:
    """The columns of the feature table, and the examples of every band."""
    n_parts = len(record.codes)
    counted = _first_copies(images)
    first, second = (_told(_parts(folder, record), progress, n, n_parts) for n in (0, n_parts))
    sums, top = _sum_up(first, record, images, counted)
    sampled = _sample(second, sums, counted, seed=record.config.seed)
    bands = choose_examples(top, sampled.image_maxima, seed=record.config.seed)
    return _columns(record, images, sums, sampled, w_dec), bands


def _parts(folder: Path, record: IndexRecord) -> Iterator[_Part]:
    per_image = record.tokens_per_image
    shards = read_shards(
        folder, record.codes, tokens_per_image=per_image, n_features=record.n_features
    )
    for shard, codes in zip(record.codes, shards, strict=True):
        yield _Part(codes, codes.max_per_image(per_image), shard.first_image)


def _told(
    parts: Iterator[_Part], progress: ProgressCallback, n_before: int, n_parts: int
) -> Iterator[_Part]:
    """The same parts, each reported when it is done with."""
    for done, part in enumerate(parts, start=n_before + 1):
        yield part
        progress(Progress(stage="describe", done=done, total=2 * n_parts, unit="shards"))


def _first_copies(images: ImageTable) -> Bool[Tensor, " image"]:
    """False for an image whose content occurred before: it serves as no example."""
    first = {content_id: row for row, content_id in reversed(list(enumerate(images.content_ids)))}
    rows = enumerate(images.content_ids)
    return torch.tensor([first[content_id] == row for row, content_id in rows])


def _sum_up(
    parts: Iterator[_Part],
    record: IndexRecord,
    images: ImageTable,
    counted: Bool[Tensor, " image"],
) -> tuple[FeatureSums, BandTable]:
    """The exact sums and the strongest images, from the first pass."""
    places = TokenPlaces.of(record.layout, record.tokens)
    classes = torch.from_numpy(images.class_indices())
    kept = {"n_features": record.n_features, "n_kept": record.config.examples_per_band}
    sums = FeatureSums.zero(record.n_features, places.n_patches, len(images.classes))
    top = BandTable.empty(**kept)
    for part in parts:
        labels = classes[part.first_image : part.first_image + part.image_max.n_tokens]
        sums = sums.plus(
            FeatureSums.of_shard(part.codes, part.image_max, places, labels, len(images.classes))
        )
        top = merge_strongest(top, strongest(_image_maxima(part, counted), **kept))
    return sums, top


def _sample(
    parts: Iterator[_Part],
    sums: FeatureSums,
    counted: Bool[Tensor, " image"],
    *,
    seed: int,
) -> _Sampled:
    """Values, image maxima and histograms, from the second pass."""
    value_shares = keep_shares(sums.n_tokens_active, budget=_MOST_VALUES)
    image_shares = keep_shares(sums.n_images_active, budget=_MOST_IMAGE_MAXIMA)
    values, maxima = [], []
    histograms = torch.zeros(sums.largest.shape[0], N_BINS, dtype=torch.int64)
    first_token = 0
    for part in parts:
        codes = part.codes
        rows = codes.tokens + first_token
        entries = FeatureSample(features=codes.features, rows=rows, values=codes.values)
        values.append(thin(entries, value_shares, seed=seed))
        maxima.append(thin(_image_maxima(part, counted), image_shares, seed=seed))
        histograms += feature_histograms(codes.features, codes.values, sums.largest)
        first_token += codes.n_tokens
    return _Sampled(join_samples(values), join_samples(maxima), histograms)


def _image_maxima(part: _Part, counted: Bool[Tensor, " image"]) -> FeatureSample:
    """The largest activation of each feature on each image that may serve as an example."""
    image_max = part.image_max
    rows = image_max.tokens + part.first_image
    kept = counted[rows]
    return FeatureSample(
        features=image_max.features[kept], rows=rows[kept], values=image_max.values[kept]
    )


def _columns(
    record: IndexRecord,
    images: ImageTable,
    sums: FeatureSums,
    sampled: _Sampled,
    w_dec: Float[Tensor, "feature d_model"],
) -> dict[str, Any]:
    """Every column of the feature table."""
    places = TokenPlaces.of(record.layout, record.tokens)
    n_active = sums.n_tokens_active.numpy()
    neighbours, cosines = nearest_features(w_dec)
    return {
        "feature": np.arange(record.n_features),
        "density": n_active / sums.n_tokens,
        "n_tokens_active": n_active,
        "n_images_active": sums.n_images_active.numpy(),
        "mean_active": sums.total.numpy() / np.maximum(n_active, 1),
        "max": sums.largest.double().numpy(),
        **_value_columns(sampled, record.n_features),
        "label_entropy": label_entropy(sums),
        **_class_columns(sums, images),
        "position_r2": position_r2(sums, places),
        "border_lift": border_lift(sums, places),
        "special_share": special_share(sums, places),
        "flags": _names_of_true(flags(sums, places), record.n_features),
        "neighbours": [[f for f in row if f >= 0] for row in neighbours.tolist()],
        "neighbour_cosines": [
            [c for f, c in zip(row, near, strict=True) if f >= 0]
            for row, near in zip(neighbours.tolist(), cosines.tolist(), strict=True)
        ],
        "histogram": sampled.histograms.tolist(),
    }


def _value_columns(sampled: _Sampled, n_features: int) -> dict[str, Any]:
    quantiles = feature_quantiles(sampled.values, _QUANTILES, n_features=n_features)
    n_values = torch.bincount(sampled.values.features, minlength=n_features)
    return {
        "q50": quantiles[:, 0],
        "q90": quantiles[:, 1],
        "q99": quantiles[:, 2],
        "n_values": n_values.numpy(),
    }


def _class_columns(sums: FeatureSums, images: ImageTable) -> dict[str, Any]:
    """The preferred classes as lists, and the first of them on its own."""
    classes = images.classes
    totals = np.bincount(images.class_indices() + 1, minlength=len(classes) + 1)[1:]
    found = class_associations(sums, totals)
    kept = found.classes >= 0
    names, lifts, counts = [], [], []
    for row, keep in enumerate(kept):
        names.append([classes[number] for number in found.classes[row][keep]])
        lifts.append(found.lifts[row][keep].tolist())
        counts.append(found.counts[row][keep].tolist())
    return {
        "best_class": [own[0] if own else None for own in names],
        "best_class_lift": [own[0] if own else None for own in lifts],
        "best_class_count": [own[0] if own else 0 for own in counts],
        "classes": names,
        "class_lifts": lifts,
        "class_counts": counts,
    }


def _names_of_true(
    columns: Mapping[str, Bool[np.ndarray, " feature"]], n_features: int
) -> list[list[str]]:
    return [[name for name, flag in columns.items() if flag[row]] for row in range(n_features)]
