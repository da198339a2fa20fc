"""Examples as web pages show them: an image and, below it, where on it the feature fires."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from visae.features.index import FeatureIndex
from visae.features.record import Example
from visae.reports.colours import as_data_uri, heat_colours
from visae.reports.wording import number

__all__ = ["Pair", "example_pairs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One example, ready for the macro ``pair``."""

    content_id: str
    """Content id of the image."""
    file: str
    """Name of the image's file in the report."""
    width: int
    """Width of the model's view in pixels."""
    height: int
    """Height of the model's view in pixels."""
    alt: str
    """What the image is, in words."""
    heat: str
    """Data URI of the patches' colours, a pixel a patch."""
    heat_alt: str
    """Where the feature fires, in words."""
    max: float
    """The feature's largest activation on it."""
    label: str
    """Class of the image, or nothing."""


def example_pairs(
    index: FeatureIndex, feature: int, examples: Sequence[Example], *, peak: float
) -> list[Pair]:
    """The pairs of some examples of one feature, in order."""
    grids = index.heat_maps(feature, [example.image_row for example in examples]).numpy()
    height, width = index.record.preprocessing.size
    pairs = []
    for example, grid in zip(examples, grids, strict=True):
        label = index.images.labels[example.image_row] or ""
        pairs.append(
            Pair(
                content_id=example.content_id,
                file=f"{example.content_id}.webp",
                width=width,
                height=height,
                alt=f"{label or 'image'}, row {example.image_row}",
                heat=as_data_uri(heat_colours(grid, peak=peak)),
                heat_alt=_in_words(grid),
                max=example.max,
                label=label,
            )
        )
    return pairs


def _in_words(grid: Float[np.ndarray, "row column"]) -> str:
    n_active = int((grid > 0).sum())
    if n_active == 0:
        return "fires on no patch"
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    most = f"most ({number(float(grid.max()))}) at row {row + 1}, column {column + 1}"
    return f"fires on {n_active} of {grid.size} patches, {most}"
