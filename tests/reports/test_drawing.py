import numpy as np
import pytest
from PIL import Image, ImageDraw

from visae.reports.drawing import draw_histogram, fit_text, text_width


@pytest.mark.parametrize("text", ["", "cat", "American Staffordshire terrier"])
@pytest.mark.parametrize("room", [0.0, 5.0, 60.0, 1000.0])
def test_text_fits_its_room(text, room):
    found = fit_text(text, room, size=12)
    assert found == "" or text_width(found, size=12) <= room
    assert found in ("", text) or (found.endswith("…") and text.startswith(found[:-1]))


def test_text_that_fits_stays():
    width = text_width("horse", size=12)
    assert fit_text("horse", width, size=12) == "horse"
    assert fit_text("horse", width - 1, size=12) != "horse"


def test_bars_have_their_heights_and_colours():
    image = Image.new("RGB", (40, 30), "white")
    draw_histogram(ImageDraw.Draw(image), (0, 0, 40, 20), [1.0, 0.0, 0.5, 0.01], ["#f00"] * 4)
    red = (np.asarray(image) == (255, 0, 0)).all(2)
    assert red.sum(0).tolist() == [20] * 10 + [0] * 10 + [10] * 10 + [1] * 10
