from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from visae.errors import ConfigError
from visae.models.patch_labels import patch_labels
from visae.models.preprocessing import Preprocessing


def naive(values, grid):
    """Label and purity of each patch, one pixel at a time."""
    height, width = values.shape
    pixels = [[] for _ in range(grid[0] * grid[1])]
    for row in range(height):
        for column in range(width):
            patch = (row * grid[0] // height) * grid[1] + column * grid[1] // width
            pixels[patch].append(max(int(values[row, column]), -1))
    found = []
    for held in pixels:
        counts = Counter(held)
        label = min(counts, key=lambda value: (-counts[value], value))
        found.append((label, np.float32(counts[label] / len(held))))
    return found


@given(data=st.data())
def test_labels_and_purity_are_those_of_counting_pixels(data):
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = tuple(data.draw(st.integers(n, 12)) for n in grid)
    kind = data.draw(st.sampled_from([np.int16, np.int32, np.int64]))
    values = data.draw(arrays(kind, size, elements=st.sampled_from([-7, -1, 0, 1, 2, 9000])))
    labels, purity = patch_labels(values, grid)
    assert (labels.dtype, purity.dtype) == (np.int32, np.float32)
    assert list(zip(labels.tolist(), purity, strict=True)) == naive(values, grid)


def test_patches_come_row_by_row():
    values = np.repeat(np.repeat([[0, 1, 2], [3, 4, 5]], 4, axis=0), 4, axis=1)
    labels, purity = patch_labels(values, (2, 3))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert purity.tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("pixels", "label", "purity"),
    [([3, 3, 5, 5], 3, 0.5), ([-1, -1, 5, 5], -1, 0.5), ([-1, -2, -3, 5], -1, 0.75)],
)
def test_of_equals_the_smallest_wins_and_all_ignored_values_are_one(pixels, label, purity):
    found = patch_labels(np.array([pixels]), (1, 1))
    assert (found.label.tolist(), found.purity.tolist()) == ([label], [purity])


@pytest.mark.parametrize("grid", [(3, 1), (1, 5), (0, 1)])
def test_a_grid_finer_than_the_mask_is_refused(grid):
    with pytest.raises(ConfigError, match=r"2 × 4 pixels cannot label"):
        patch_labels(np.zeros((2, 4), np.int32), grid)


def test_values_that_no_mask_of_classes_holds_are_refused():
    with pytest.raises(ConfigError, match="class value 65536"):
        patch_labels(np.array([[0, 65_536]]), (1, 1))
    assert patch_labels(np.array([[65_535]]), (1, 1)).label.tolist() == [65_535]


COLOURS = np.random.default_rng(1).permutation(256)[:16].astype(np.uint8)


@given(
    st.integers(10, 70),
    st.integers(10, 70),
    st.sampled_from([(24, 24), (24, 32), (32, 16)]),
    st.sampled_from([1.0, 0.9, 0.875]),
    st.sampled_from(["center", "squash"]),
)
def test_mask_and_image_stay_together(height, width, size, crop_share, crop):
    classes = np.random.default_rng(height * 71 + width).integers(0, 16, (height, width))
    image = Image.fromarray(COLOURS[classes]).convert("RGB")
    mask = Image.fromarray(classes.astype(np.int32))
    preprocessing = Preprocessing(
        size=size, crop_share=crop_share, crop=crop, interpolation="nearest"
    )
    seen = np.asarray(preprocessing.mask_view(mask))
    np.testing.assert_array_equal(COLOURS[seen], np.asarray(preprocessing.view(image))[..., 0])


def test_a_smooth_view_shows_the_class_that_the_mask_says():
    """Blocks of two greys, scaled smoothly: the patch's mean colour tells its label."""
    classes = np.kron(np.random.default_rng(0).integers(0, 2, (5, 7)), np.ones((40, 40), np.int32))
    image = Image.fromarray((classes * 255).astype(np.uint8)).convert("RGB")
    preprocessing = Preprocessing(size=(64, 64), crop_share=0.875, interpolation="bicubic")
    mask = preprocessing.mask_view(Image.fromarray(classes.astype(np.int32)))
    labels, purity = patch_labels(np.asarray(mask), (8, 8))
    view = np.asarray(preprocessing.view(image), dtype=float)[..., 0]
    share_of_white = view.reshape(8, 8, 8, 8).mean((1, 3)).ravel() / 255
    expected = np.where(labels == 1, purity, 1 - purity)
    np.testing.assert_allclose(share_of_white, expected, atol=0.05)
    assert len(set(purity.tolist())) > 2


def test_a_mask_view_holds_only_values_of_the_mask():
    mask = Image.fromarray(np.array([[-1, 40_000], [3, 7]], np.int32))
    seen = Preprocessing(size=(9, 9)).mask_view(mask)
    assert seen.mode == "I"
    assert set(np.asarray(seen).ravel().tolist()) == {-1, 40_000, 3, 7}
