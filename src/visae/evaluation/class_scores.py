"""Whether an SAE has a feature for each class: chosen on some images, scored on others.

For every class the feature with the highest average precision on the discovery images is chosen
and scored on the confirmation images. Three figures follow: the mean average precision, the share
of classes covered (average precision of at least 0.3), and the precision of the 16 images with
the largest activations. Source: METHODS §6, RIGOR §5.

Main names: ``label_images``, ``class_probe``, ``permuted_figures``.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from visae.evaluation.config import EvaluateConfig
from visae.evaluation.probes import (
    RankedCodes,
    average_precision_of,
    rank_codes,
    weighted_scores,
)
from visae.evaluation.tokens import spread_evenly
from visae.images.catalog import ImageTable
from visae.saes.codes import SparseCodes
from visae.statistics.units import unit_codes

__all__ = [
    "FIGURES",
    "Choice",
    "ClassProbe",
    "LabelledImages",
    "class_probe",
    "label_images",
    "permuted_figures",
    "permuted_labels",
]

FIGURES = ("class_average_precision", "class_coverage", "top_precision")
"""What ``ClassProbe.figures`` gives, in order."""

_FEWEST = 2  # images of a class on each side; with one alone no precision means anything
_CHUNK_ELEMENTS = 2**24  # scores (feature, class) held at once: 128 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """The images of a store that class metrics use, and on which side each of them is."""

    rows: Int64[np.ndarray, " image"]
    """Their rows in the store, ascending."""
    classes: Int64[np.ndarray, " image"]
    """Class of each image."""
    names: tuple[str, ...]
    """Name of each class."""
    units: Int64[np.ndarray, " image"]
    """Independent unit of each image: its own, or its group's."""
    confirms: Bool[np.ndarray, " image"]
    """Whether the image is on the confirmation side."""
    scored: tuple[int, ...]
    """Classes with at least two images on each side."""

    @property
    def problem(self) -> str:
        """Why there can be no class metrics, or nothing."""
        if not self.names:
            return "the images have no labels"
        if len(self.names) == 1:
            return f"all labelled images are of one class, {self.names[0]}"
        if not self.scored:
            return f"no class has {_FEWEST} images on the discovery and {_FEWEST} on the other side"
        return ""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of classes with too few images."""
        return tuple(n for i, n in enumerate(self.names) if i not in set(self.scored))

    def groups(self) -> list[str | int | None]:
        """The unit of each confirmation image, for the bootstrap."""
        return [int(unit) for unit in self.units[self.confirms]]


def label_images(images: ImageTable, config: EvaluateConfig) -> LabelledImages:
    """The labelled images of a store, at most ``n_class_images`` spread evenly, with sides."""
    classes = images.class_indices()
    rows = np.flatnonzero(classes >= 0)
    rows = rows[spread_evenly(len(rows), config.n_class_images)]
    sides = images.sides(confirmation_share=config.confirmation_share, salt=config.salt)
    confirms = np.array([sides[row] == "confirmation" for row in rows], dtype=bool)
    n_classes = len(images.classes)
    counts = [
        np.bincount(classes[rows[side]], minlength=n_classes) for side in (confirms, ~confirms)
    ]
    return LabelledImages(
        rows=rows,
        classes=classes[rows],
        names=images.classes,
        units=unit_codes([images.groups[row] for row in rows]),
        confirms=confirms,
        scored=tuple(np.flatnonzero(np.minimum(*counts) >= _FEWEST).tolist()),
    )


class Choice(NamedTuple):
    """The best feature for each scored class."""

    features: Int64[np.ndarray, " class"]
    """The features."""
    precision: Float64[np.ndarray, " class"]
    """Their average precision on the images that chose them."""


@dataclasses.dataclass(frozen=True)
class ClassProbe:
    """Image-level codes of labelled images, sorted once for any number of labellings."""

    labelled: LabelledImages
    """The images."""
    discovery: tuple[RankedCodes, ...]
    """Codes of the discovery images, some features at a time."""
    confirmation: RankedCodes
    """Codes of the confirmation images."""

    def choose(self, classes: Int64[np.ndarray, " image"]) -> Choice:
        """The best feature for each scored class on the discovery images, given their classes."""
        scored, n_classes = list(self.labelled.scored), len(self.labelled.names)
        features = np.zeros(len(scored), dtype=np.int64)
        best = np.full(len(scored), -np.inf)
        first = 0
        for ranked in self.discovery:
            scores = average_precision_of(ranked, classes, n_classes)[:, scored]
            here = scores.argmax(0)
            highest = scores[here, np.arange(len(scored))]
            features = np.where(highest > best, here + first, features)
            best = np.maximum(best, highest)
            first += ranked.n_features
        return Choice(features, best)

    def score(
        self,
        features: Int64[np.ndarray, " class"],
        classes: Int64[np.ndarray, " image"],
        weights: Float[np.ndarray, "resample image"],
        *,
        n_top: int,
    ) -> Float64[np.ndarray, "score class resample"]:
        """Average precision and precision of the top of chosen features, confirmation images."""
        scores = [
            weighted_scores(
                self.confirmation.column(int(feature)), classes == number, weights, n_top=n_top
            )
            for number, feature in zip(self.labelled.scored, features, strict=True)
        ]
        return np.stack(scores, axis=1)

    def figures(
        self,
        features: Int64[np.ndarray, " class"],
        classes: Int64[np.ndarray, " image"],
        weights: Float[np.ndarray, "resample image"],
        *,
        config: EvaluateConfig,
    ) -> Float64[np.ndarray, "figure resample"]:
        """``FIGURES`` of chosen features; a class without weight in a resample is left out."""
        average, top = self.score(features, classes, weights, n_top=config.n_top)
        covered = np.where(np.isnan(average), np.nan, average >= config.coverage_precision)
        return np.stack([_mean_of_known(each) for each in (average, covered, top)])


def class_probe(codes: SparseCodes, labelled: LabelledImages) -> ClassProbe:
    """Sort the codes of labelled images, given in the order of ``labelled.rows``."""
    import torch

    confirms = torch.from_numpy(labelled.confirms)
    discovery = codes.take(torch.nonzero(~confirms).flatten())
    step = max(1, _CHUNK_ELEMENTS // max(1, len(labelled.names)))
    chunks = [
        range(start, min(start + step, codes.n_features))
        for start in range(0, codes.n_features, step)
    ]
    return ClassProbe(
        labelled=labelled,
        discovery=tuple(rank_codes(discovery, features=chunk) for chunk in chunks),
        confirmation=rank_codes(codes.take(torch.nonzero(confirms).flatten())),
    )


def permuted_figures(
    probe: ClassProbe, *, config: EvaluateConfig
) -> Float64[np.ndarray, "figure permutation"]:
    """``FIGURES`` when the labels mean nothing: the whole of choosing and scoring, repeated.

    Labels are permuted within each side, so every class keeps its number of images there. Images
    of one group keep neighbouring labels. The best of all features is taken every time, so these
    are draws of the max statistic.
    """
    labelled, generator = probe.labelled, np.random.default_rng(config.seed)
    confirms = labelled.confirms
    sides = [(labelled.classes[side], labelled.units[side]) for side in (~confirms, confirms)]
    weights = np.ones((1, int(confirms.sum())))
    draws = []
    for _ in range(config.n_permutations):
        discovery, confirmation = (permuted_labels(*side, generator) for side in sides)
        chosen = probe.choose(discovery).features
        draws.append(probe.figures(chosen, confirmation, weights, config=config))
    return np.concatenate(draws, axis=1)


def permuted_labels(
    classes: Int64[np.ndarray, " image"],
    units: Int64[np.ndarray, " image"],
    generator: np.random.Generator,
) -> Int64[np.ndarray, " image"]:
    """The labels in the order of the units, handed to the units in a random order.

    Without groups this is any permutation; groups of equal size exchange their labels whole.
    """
    shuffled = generator.permutation(int(units.max()) + 1)[units]
    permuted = np.empty_like(classes)
    permuted[np.argsort(shuffled, kind="stable")] = classes[np.argsort(units, kind="stable")]
    return permuted


def _mean_of_known(
    per_class: Float64[np.ndarray, "class resample"],
) -> Float64[np.ndarray, " resample"]:
    """Mean over the classes that are defined; NaN where none is."""
    known = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        mean: Float64[np.ndarray, " resample"] = np.where(known, per_class, 0.0).sum(0) / known.sum(
            0
        )
    return mean
