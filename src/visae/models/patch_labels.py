"""From a mask of class values to one label a patch: the majority class, and how pure it is.

Recording calls this on ``Preprocessing.mask_view``; the labels lie beside the activations, patch by
patch in the order of the tokens (row by row).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from visae.errors import ConfigError

__all__ = ["LabelledPatches", "patch_labels"]

_HIGHEST_VALUE = 2**16 - 1


class LabelledPatches(NamedTuple):
    """The patches of one image, row by row."""

    label: Int32[np.ndarray, " patch"]
    """Class value that most of the patch's pixels hold, −1 where most are ignored."""
    purity: Float32[np.ndarray, " patch"]
    """Share of the patch's pixels that hold it, above 0 and at most 1."""


def patch_labels(
    values: Integer[np.ndarray, "height width"], grid: tuple[int, int]
) -> LabelledPatches:
    """The majority class of each patch among all its pixels, and the share of it.

    A pixel in row r of H belongs to row ⌊r · R / H⌋ of a grid of R rows, and so for columns: equal
    squares wherever the grid divides the image. Ignored pixels (any negative value) count together
    as the class −1. Of classes with equally many pixels the smallest value wins, −1 among them.

    Args:
        values: Class value of each pixel as the model sees it, negative where ignored.
        grid: Rows and columns of the patches.

    Raises:
        ConfigError: when the grid has more rows or columns than the mask has pixels, or a value is
            above 65535.
    """
    height, width = values.shape
    if not (0 < grid[0] <= height and 0 < grid[1] <= width):
        raise ConfigError(
            f"A mask of {height} × {width} pixels cannot label {grid[0]} × {grid[1]} patches",
            fix="Give the mask as the model sees it",
        )
    classes, class_of_pixel = _present_classes(values)
    n_patches = grid[0] * grid[1]
    cells = _patch_of_pixel(values.shape, grid) * len(classes) + class_of_pixel
    counts = np.bincount(cells, minlength=n_patches * len(classes)).reshape(n_patches, -1)
    best = counts.argmax(axis=1)  # the first of equals: the smallest value
    purity = counts[np.arange(n_patches), best] / counts.sum(axis=1)
    return LabelledPatches(classes[best].astype(np.int32), purity.astype(np.float32))


def _present_classes(
    values: Integer[np.ndarray, "height width"],
) -> tuple[Int64[np.ndarray, " class"], Int64[np.ndarray, " pixel"]]:
    """The values that occur, ascending, and which of them each pixel holds; −1 if ignored."""
    above_ignored = np.maximum(values, -1).astype(np.int64).ravel() + 1
    if above_ignored.max() > _HIGHEST_VALUE + 1:
        what = f"A mask holds the class value {above_ignored.max() - 1}"
        raise ConfigError(what, fix=f"Use class values up to {_HIGHEST_VALUE}")
    present = np.flatnonzero(np.bincount(above_ignored))
    rank = np.zeros(present[-1] + 1, dtype=np.int64)
    rank[present] = np.arange(len(present))
    return present - 1, rank[above_ignored]


def _patch_of_pixel(size: tuple[int, ...], grid: tuple[int, int]) -> Int64[np.ndarray, " pixel"]:
    """Which patch each pixel lies in, both row by row."""
    row, column = (
        np.arange(n_pixels, dtype=np.int64) * n_patches // n_pixels
        for n_pixels, n_patches in zip(size, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column).ravel()
