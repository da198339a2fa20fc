"""How well single features rank the images of a class, from sparse image-level codes.

    AP = Σ over distinct activations a of (R(a) − R(above a)) · P(a)

with precision P and recall R among images whose activation is at least a. Images at which the
feature is silent tie at the end, and so count as one block. This is scikit-learn's
``average_precision_score``, computed from the active entries alone. Source: METHODS §6.

Main names: ``average_precision``, ``best_feature_per_class``, ``RankedColumn``.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from visae.saes.codes import SparseCodes

__all__ = [
    "RankedCodes",
    "RankedColumn",
    "average_precision",
    "average_precision_of",
    "best_feature_per_class",
    "rank_codes",
    "weighted_scores",
]

_SHORT_CLASSES = 2**15  # class numbers below this are sorted in linear time


class RankedCodes(NamedTuple):
    """Entries of image-level codes by feature, the largest activation of each feature first."""

    images: Int64[np.ndarray, " entry"]
    """Image of each entry."""
    features: Int64[np.ndarray, " entry"]
    """Feature of each entry, ascending."""
    ties: Int64[np.ndarray, " entry"]
    """Number of the run of equal activations that each entry is in."""
    reached: Float64[np.ndarray, " entry"]
    """Images whose activation of this feature is at least as large."""
    starts: Int64[np.ndarray, " feature_plus_one"]
    """Where each feature's entries start; the last element is the number of entries."""
    n_images: int
    """Images, those at which nothing is active included."""

    @property
    def n_features(self) -> int:
        """Number of features."""
        return len(self.starts) - 1

    def column(self, feature: int) -> "RankedColumn":
        """The entries of one feature."""
        entries = slice(self.starts[feature], self.starts[feature + 1])
        return RankedColumn(self.images[entries], _run_ends(self.ties[entries]))


class RankedColumn(NamedTuple):
    """The images at which one feature is active, the largest activation first."""

    images: Int64[np.ndarray, " entry"]
    """The images."""
    run_ends: Int64[np.ndarray, " run"]
    """The last entry of each run of equal activations."""


def average_precision(
    codes: SparseCodes,
    classes: Int64[Tensor, " image"],
    n_classes: int,
    *,
    features: range | None = None,
) -> Float64[Tensor, "feature class"]:
    """Average precision of every feature as a detector of every class.

    Args:
        codes: The codes of images (``SparseCodes.max_per_image``).
        classes: Class of each image from 0, or −1 for one without label, which is left out.
        n_classes: Number of classes; one without images has NaN.
        features: The features to score, all unless given. The result has 8 bytes a feature and
            class, and about 50 bytes an active entry of these features are needed besides.
    """
    labelled = torch.nonzero(classes >= 0).flatten()
    ranked = rank_codes(codes.take(labelled), features=features)
    scores = average_precision_of(ranked, classes[labelled].numpy(), n_classes)
    return torch.from_numpy(scores)


def best_feature_per_class(
    scores: Float64[Tensor, "feature class"],
) -> Int64[Tensor, " class"]:
    """The feature with the highest score for each class, the first of equal ones; −1 for NaN."""
    best = scores.nan_to_num(-1.0)
    is_best = best == best.max(0, keepdim=True).values
    first = is_best.int().argmax(0)  # argmax of 0 and 1 gives the first 1
    return torch.where(scores.isnan().all(0), torch.full_like(first, -1), first)


def rank_codes(codes: SparseCodes, *, features: range | None = None) -> RankedCodes:
    """Sort the entries of image-level codes, once for any number of labellings.

    With ``features``, only these are kept and numbered from 0.
    """
    chosen = range(codes.n_features) if features is None else features
    images, entry_features = codes.tokens.numpy(), codes.features.numpy()
    values = codes.values.numpy()
    if features is not None:
        inside = (entry_features >= chosen.start) & (entry_features < chosen.stop)
        images, values = images[inside], values[inside]
        entry_features = entry_features[inside] - chosen.start
    order = np.lexsort((-values, entry_features))
    images, entry_features, values = images[order], entry_features[order], values[order]
    counts = np.bincount(entry_features, minlength=len(chosen))
    starts = np.concatenate([[0], counts.cumsum()])
    ties = _runs(entry_features, values)
    last = _run_ends(ties)[ties] if len(ties) else ties
    reached = (last - starts[entry_features] + 1).astype(np.float64)
    return RankedCodes(images, entry_features, ties, reached, starts, codes.n_tokens)


def average_precision_of(
    ranked: RankedCodes, classes: Int64[np.ndarray, " image"], n_classes: int
) -> Float64[np.ndarray, "feature class"]:
    """Average precision as ``average_precision``; every image has a class.

    Each active entry adds the precision at its own rank to the feature's score for its own class,
    so time grows with the entries and not with entries × classes.
    """
    of_entry = classes[ranked.images]
    small = of_entry.astype(np.int16) if n_classes < _SHORT_CLASSES else of_entry
    order = np.argsort(small, kind="stable")  # by class, then feature, then rank
    entry_classes, features, ties = of_entry[order], ranked.features[order], ranked.ties[order]
    hits = _position_in_run(_runs(entry_classes, features))
    if len(ties) and ranked.ties[-1] + 1 < len(ties):  # of equal activations, the last one counts
        tied = _runs(entry_classes, ties)
        hits = hits[_run_ends(tied)][tied]
    keys = features * n_classes + entry_classes
    shape, size = (ranked.n_features, n_classes), ranked.n_features * n_classes
    precision = np.bincount(keys, weights=hits / ranked.reached[order], minlength=size)
    found = np.bincount(keys, minlength=size).reshape(shape)
    positives = np.bincount(classes, minlength=n_classes).astype(np.float64)
    silent = (positives - found) * (positives / ranked.n_images)
    with np.errstate(invalid="ignore"):
        scores: Float64[np.ndarray, "feature class"] = (
            precision.reshape(shape) + silent
        ) / positives
    return scores


def weighted_scores(
    column: RankedColumn,
    positive: Bool[np.ndarray, " image"],
    weights: Float[np.ndarray, "resample image"],
    *,
    n_top: int,
) -> tuple[Float[np.ndarray, " resample"], Float[np.ndarray, " resample"]]:
    """Average precision, and precision of the top, of one feature and class.

    Every image counts as often as its weight says, once for each row. Where images tie at the
    edge of the top, the expected precision under random order is taken. NaN where no image of the
    class has weight.
    """
    drawn = weights[:, column.images]
    marked = np.flatnonzero(positive[column.images])
    runs, of_run = np.unique(np.searchsorted(column.run_ends, marked), return_inverse=True)
    ends = column.run_ends[runs]
    starts = np.where(runs > 0, column.run_ends[runs - 1] + 1, 0)
    # Only runs with an image of the class add anything; the silent images are one more such run.
    cumulative = np.cumsum(drawn, axis=1)
    n_images, positives = weights.sum(1, keepdims=True), (weights @ positive)[:, None]
    active = cumulative[:, -1:] if cumulative.shape[1] else np.zeros_like(n_images)
    reached = np.hstack([cumulative[:, ends], n_images])
    above = np.hstack([cumulative[:, starts] - drawn[:, starts], active])
    new_hits = drawn[:, marked]
    if len(runs) < len(marked):
        new_hits = np.add.reduceat(new_hits, _run_starts(of_run), axis=1)
    silent_hits = positives - new_hits.sum(1, keepdims=True)
    new_hits = np.hstack([new_hits, silent_hits])
    new = reached - above
    in_top = np.clip(n_top - above, 0.0, new)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(reached > 0, np.cumsum(new_hits, axis=1) / reached, 0.0)
        share = np.where(new > 0, new_hits / new, 0.0)
        average = (new_hits * precision).sum(1) / positives[:, 0]
    top = (in_top * share).sum(1) / np.minimum(n_top, n_images[:, 0])
    return average, np.where(positives[:, 0] > 0, top, np.nan)


def _runs(*columns: np.ndarray) -> Int64[np.ndarray, " entry"]:
    """Number of the run of entries that are equal in every column, from 0."""
    changes = [column[1:] != column[:-1] for column in columns]
    starts = np.concatenate([[0], np.logical_or.reduce(changes)])[: len(columns[0])]
    numbers: Int64[np.ndarray, " entry"] = np.cumsum(starts, dtype=np.int64)
    return numbers


def _run_ends(runs: Int64[np.ndarray, " entry"]) -> Int64[np.ndarray, " run"]:
    """The last entry of each run."""
    return np.flatnonzero(np.append(runs[1:] != runs[:-1], True))[: len(runs)]


def _run_starts(runs: Int64[np.ndarray, " entry"]) -> Int64[np.ndarray, " run"]:
    """The first entry of each run."""
    return np.flatnonzero(np.append(True, runs[1:] != runs[:-1]))[: len(runs)]


def _position_in_run(runs: Int64[np.ndarray, " entry"]) -> Float64[np.ndarray, " entry"]:
    """Place of each entry in its run: 1 for the first, 2 for the second and so on."""
    starts = _run_starts(runs)
    places: Float64[np.ndarray, " entry"] = np.arange(1.0, len(runs) + 1) - starts[runs]
    return places
