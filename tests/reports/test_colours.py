import base64
import io

import numpy as np
import pytest
from PIL import Image

from visae.reports.colours import as_data_uri, heat_colours, hex_colours


def luminance(rgb):
    """Relative luminance of sRGB colours in [0, 255]."""
    share = np.asarray(rgb, dtype=float)[..., :3] / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_a_patch_that_does_not_fire_is_clear_and_one_that_does_is_not():
    colours = heat_colours(np.array([[0.0, 0.001], [1.0, -1.0]]), peak=2.0)
    assert (colours[..., 3] > 0).tolist() == [[False, True], [True, False]]


def test_stronger_is_brighter_and_more_opaque():
    colours = heat_colours(np.linspace(0.01, 1.0, 50)[None], peak=1.0)[0]
    assert (np.diff(luminance(colours)) > 0).all()
    assert (np.diff(colours[:, 3].astype(int)) >= 0).all()
    assert colours[-1, 3] < 255  # the image shows through


def test_the_peak_has_the_strongest_colour_and_nothing_goes_beyond():
    colours = heat_colours(np.array([[3.0, 30.0]]), peak=3.0)
    assert colours[0, 0].tolist() == colours[0, 1].tolist()


def test_a_feature_that_never_fires_is_clear():
    assert not heat_colours(np.zeros((2, 3)), peak=0.0)[..., 3].any()


def test_the_legend_has_the_colours_of_the_map():
    middles = (np.arange(8) + 0.5) / 8
    rgb = heat_colours(middles[None], peak=1.0)[0, :, :3]
    expected = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb]
    assert hex_colours(8) == expected


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (37, 37)])
def test_a_data_uri_has_a_pixel_a_patch(shape):
    colours = heat_colours(np.random.default_rng(0).random(shape), peak=1.0)
    head, data = as_data_uri(colours).split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image), colours)
