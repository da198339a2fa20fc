import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from visae.reports.charts import (
    ScoreRow,
    dose_response,
    effect_against_controls,
    histogram,
    score_against_nulls,
)

RNG = np.random.default_rng(0)
CONTROLS = {
    "random directions": RNG.normal(0, 0.02, 100),
    "<few> & $odd$": RNG.normal(0, 0.02, 5).tolist(),
}
ROWS = [
    ScoreRow(name="explained variance", score=0.8, interval=(0.7, 0.9), nulls={"untrained": 0.1}),
    ScoreRow(name="mAP <i>", score=0.5, nulls={"shuffled": 0.2, "untrained": 0.3}),
]


def draw_all():
    return [
        histogram([1, 4, 2], [0, 1, 2, 3], xlabel="activation", ylabel="tokens"),
        dose_response(
            [1, -1, 0], [-0.2, 0.1, 0], [-0.3, 0, 0], [-0.1, 0.2, 0], xlabel="dose", ylabel="ΔP"
        ),
        effect_against_controls(-0.2, (-0.25, -0.15), CONTROLS, xlabel="ΔP(ship)"),
        score_against_nulls(ROWS),
    ]


CHARTS = draw_all()
names = pytest.mark.parametrize("svg", CHARTS, ids=["histogram", "dose", "controls", "scores"])


@names
def test_a_chart_is_one_well_formed_svg_element(svg):
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    assert root.tag.endswith("}svg")
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.get("height") is None


@names
def test_a_chart_follows_the_page_it_is_in(svg):
    assert "currentColor" in svg
    assert "#0a0b0c" not in svg
    assert "font-family" not in svg
    assert "<style" not in svg
    assert not re.search(r"fill: (#000000|black|#ffffff|white)", svg)


@names
def test_every_text_takes_the_colour_of_the_page(svg):
    texts = re.findall(r"<text[^>]*>", svg)
    assert texts
    assert all("fill: currentColor" in text for text in texts)


@names
def test_a_chart_has_no_date_and_no_address_to_load(svg):
    assert not re.search(r"<metadata|\d{4}-\d\d-\d\dT", svg)
    addresses = re.findall(r'(?:href|src)="([^"]*)"', svg)
    assert all(address.startswith("#") for address in addresses)


def test_the_same_data_give_the_same_bytes_whatever_the_users_settings():
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        assert draw_all() == CHARTS


def test_the_users_settings_stay():
    before = dict(mpl.rcParams)
    draw_all()
    assert dict(mpl.rcParams) == before


def test_charts_of_one_page_share_no_name():
    ids = [name for svg in CHARTS for name in re.findall(r' id="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in CHARTS:
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert used == set(re.findall(r' id="([^"]*)"', svg))


def test_names_are_written_as_they_are():
    texts = "".join(ET.fromstring(CHARTS[2]).itertext())  # noqa: S314 - our own text
    for expected in ("random directions", "n = 100", "<few> & $odd$", "n = 5", "ΔP(ship)"):
        assert expected in texts
    texts = "".join(ET.fromstring(CHARTS[3]).itertext())  # noqa: S314 - our own text
    for expected in ("explained variance", "mAP <i>", "untrained", "shuffled", "SAE"):
        assert expected in texts


def test_the_order_of_the_doses_does_not_matter():
    one = dose_response([0, 1], [0.0, 2.0], [0.0, 1.5], [0.0, 2.5], xlabel="x", ylabel="y")
    other = dose_response([1, 0], [2.0, 0.0], [1.5, 0.0], [2.5, 0.0], xlabel="x", ylabel="y")
    assert one == other


def test_without_controls_the_effect_is_still_drawn():
    ET.fromstring(effect_against_controls(0.1, (0.0, 0.2), {}, xlabel="x"))  # noqa: S314
