import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visae.errors import FeatureIndexError
from visae.reports.figures import feature_sheet, heat_overlay, log_heights, overview_sheet

GREY = 120


def lit(overlay):
    """Which pixels of an overlay over plain grey are coloured."""
    pixels = np.asarray(overlay).astype(int)
    return (pixels.max(2) - pixels.min(2)) > 0


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    data=st.data(),
)
def test_a_known_patch_lights_exactly_its_pixels(grid, scale, data):
    row, column = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    values = np.zeros(grid)
    values[row, column] = 1.5
    height, width = grid[0] * scale[0], grid[1] * scale[1]
    overlay = heat_overlay(Image.new("RGB", (width, height), (GREY,) * 3), values, peak=2.0)
    expected = np.zeros((height, width), dtype=bool)
    rows = slice(row * scale[0], (row + 1) * scale[0])
    expected[rows, column * scale[1] : (column + 1) * scale[1]] = True
    assert np.array_equal(lit(overlay), expected)


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(12, 60), st.integers(12, 60)),
    data=st.data(),
)
def test_at_any_size_a_pixel_shows_the_patch_that_covers_its_centre(grid, size, data):
    values = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=144, max_size=144)))[
        : grid[0] * grid[1]
    ].reshape(grid)
    view = Image.new("RGB", (30, 30), (GREY,) * 3)
    overlay = heat_overlay(view, values, peak=1.0, size=size)
    width, height = size
    expected = [
        [
            values[int((y + 0.5) * grid[0] / height), int((x + 0.5) * grid[1] / width)] > 0
            for x in range(width)
        ]
        for y in range(height)
    ]
    assert np.array_equal(lit(overlay), np.array(expected))


def test_where_nothing_fires_the_image_is_there_in_grey():
    gradient = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    view = Image.fromarray(np.stack([gradient] * 3, axis=2))
    found = np.asarray(heat_overlay(view, np.zeros((4, 4)), peak=1.0)).astype(float)
    assert np.ptp(found, axis=2).max() == 0
    assert np.corrcoef(found[..., 0].ravel(), gradient.ravel())[0, 1] > 0.999


def test_under_the_strongest_colour_the_image_still_shows():
    stripes = np.zeros((32, 32, 3), dtype=np.uint8)
    stripes[::2] = 255
    found = np.asarray(heat_overlay(Image.fromarray(stripes), np.ones((2, 2)), peak=1.0))
    assert (found[::2].astype(int) - found[1::2]).min() > 15


def test_the_heat_map_of_an_index_lights_the_patch_that_fires(index):
    for image in (0, 5, 11, 23):
        grid = index.heat_map(0, image).numpy()
        view = index.thumbnail(index.images.content_ids[image])
        row, column = divmod(image % 8, 4)
        expected = np.zeros((20, 40), dtype=bool)
        expected[row * 10 : (row + 1) * 10, column * 10 : (column + 1) * 10] = True
        base = view.convert("L").convert("RGB")
        assert np.array_equal(lit(heat_overlay(base, grid, peak=24.0)), expected)


def test_a_sheet_shows_every_band_with_its_heat_maps(index):
    sheet = np.asarray(feature_sheet(index, 0, tile=140)).astype(int)
    n_bands = sum(bool(examples) for examples in index.examples(0).values())
    assert n_bands == 5
    saturated = np.ptp(sheet, axis=2) > 60
    assert saturated.any()
    wider = feature_sheet(index, 0, tile=180)
    assert wider.width - sheet.shape[1] == 9 * 40
    assert wider.height - sheet.shape[0] == n_bands * 2 * 20  # views are twice as wide as high


def test_a_sheet_is_the_same_every_time(index):
    one, other = feature_sheet(index, 0, tile=40), feature_sheet(index, 0, tile=40)
    assert one.tobytes() == other.tobytes()


def test_a_dead_feature_has_a_sheet_that_says_so(index):
    sheet = feature_sheet(index, 1, tile=40)
    assert sheet.height < feature_sheet(index, 3, tile=40).height
    dark = np.asarray(sheet.convert("L"))[150:] < 160
    assert dark.any()


def test_a_feature_with_few_images_leaves_places_empty(index):
    sheet = feature_sheet(index, 3, tile=40)
    assert sheet.width == feature_sheet(index, 0, tile=40).width


def test_a_number_out_of_range_is_refused(index):
    with pytest.raises(FeatureIndexError, match="from 0 to 3"):
        feature_sheet(index, 4)
    with pytest.raises(FeatureIndexError, match="from 0 to 3"):
        overview_sheet(index, [0, 9])


def test_an_overview_has_a_block_for_each_feature(index):
    one = overview_sheet(index, [0], tile=40)
    two = overview_sheet(index, [0, 2], tile=40)
    three = overview_sheet(index, [0, 2, 3], tile=40)
    assert one.size == two.size
    assert three.height > two.height
    assert three.width == two.width
    assert overview_sheet(index, [0, 2], tile=40, n_columns=1).height == three.height


def test_bars_are_logarithmic():
    assert log_heights([0, 1, 3]) == pytest.approx([0, 0.5, 1])
    assert log_heights([0, 0]) == [0, 0]
