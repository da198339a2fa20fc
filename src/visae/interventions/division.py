"""Which images an experiment learns from, which it is tested on, and what counts as one of them.

Images are divided by their content or group alone, so that the division is the same whatever is
looked at. Source: RIGOR §5, §6. Main name: ``divide_images``.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from visae.errors import ExperimentError, nearest_names
from visae.images.catalog import ImageTable
from visae.interventions.spec import OutcomeConfig, SplitConfig
from visae.interventions.tasks import FEWEST_IMAGES

__all__ = [
    "DividedImages",
    "count_units",
    "divide_images",
    "image_units",
    "learnable_classes",
    "spread_evenly",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DividedImages:
    """Rows of a store's images by what they are for."""

    discovery: list[int]
    """Everything may be learned from these."""
    confirmation: list[int]
    """Nothing may be learned from these."""
    target: list[int]
    """Confirmation images of the target class: the verdict rests on them."""
    others: dict[str, list[int]]
    """An even sample of the confirmation images of each other class that has two or more."""


def divide_images(images: ImageTable, split: SplitConfig, outcome: OutcomeConfig) -> DividedImages:
    """Divide the images of a store for an experiment about a class.

    Raises:
        ConfigError: when equal images belong to groups of different sides.
        ExperimentError: when a side is empty, the discovery images are too few for a probe of the
            class, or fewer than two independent confirmation images have it.
    """
    sides = images.sides(confirmation_share=split.confirmation_share, salt=split.salt)
    discovery = [row for row, side in enumerate(sides) if side == "discovery"]
    confirmation = [row for row, side in enumerate(sides) if side == "confirmation"]
    if not discovery or not confirmation:
        raise ExperimentError(
            f"The split leaves {len(discovery)} discovery and {len(confirmation)} confirmation "
            "images",
            where="split",
            fix="Give more images, or another confirmation_share",
        )
    _require_learnable(images, discovery, outcome.class_name)
    rows: dict[str, list[int]] = {name: [] for name in learnable_classes(images, discovery)}
    for row in confirmation:
        label = images.labels[row]
        if label is not None and label in rows:
            rows[label].append(row)
    target = rows.pop(outcome.class_name)
    _require_independent(images, target, outcome.class_name)
    others = {n: spread_evenly(found, outcome.n_per_other_class) for n, found in rows.items()}
    return DividedImages(
        discovery=discovery,
        confirmation=confirmation,
        target=target,
        others={name: found for name, found in others.items() if count_units(images, found) > 1},
    )


def learnable_classes(images: ImageTable, rows: Sequence[int]) -> list[str]:
    """Classes with images enough among these rows for a probe to learn them, sorted."""
    counts = Counter(images.labels[row] for row in rows)
    return sorted(
        name for name, count in counts.items() if name is not None and count >= FEWEST_IMAGES
    )


def image_units(images: ImageTable, rows: Sequence[int]) -> list[str]:
    """What each image counts as: its group, else its content: a copy is no second observation."""
    groups, contents = images.groups, images.content_ids
    return [
        f"image {contents[row]}" if groups[row] is None else f"group {groups[row]}" for row in rows
    ]


def count_units(images: ImageTable, rows: Sequence[int]) -> int:
    """How many independent observations some images are."""
    return len(set(image_units(images, rows)))


def spread_evenly(rows: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the rows, spread evenly over them."""
    step = max(1.0, len(rows) / max(1, limit))
    return [rows[int(i * step)] for i in range(min(limit, len(rows)))]


def _require_learnable(images: ImageTable, discovery: Sequence[int], class_name: str) -> None:
    known = learnable_classes(images, discovery)
    if class_name in known:
        return
    n_images = sum(images.labels[row] == class_name for row in discovery)
    if n_images:
        raise ExperimentError(
            f"Class {class_name} has {n_images} discovery images, and a probe needs "
            f"{FEWEST_IMAGES}",
            where="outcome.class_name",
            fix="Give more images of this class",
        )
    raise ExperimentError(
        f"No discovery image has the label {class_name}",
        where="outcome.class_name",
        fix=f"Use one of: {nearest_names(class_name, known)}",
    )


def _require_independent(images: ImageTable, target: Sequence[int], class_name: str) -> None:
    n_units = count_units(images, target)
    if n_units < 2:
        raise ExperimentError(
            f"There are {len(target)} confirmation images of {class_name}, {n_units} of them "
            "independent",
            where="outcome.class_name",
            fix="Give more images of this class, of different groups where they have groups",
        )
