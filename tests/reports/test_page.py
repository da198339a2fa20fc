import io
import re
from importlib.resources import files

import jinja2
import numpy as np
import pytest
from PIL import Image

import visae
from visae.reports.charts import histogram
from visae.reports.page import picture_uri, render, svg_markup, write_page

STYLE = (files("visae.reports") / "templates/style.css").read_text(encoding="utf-8")


def rendered(source, **context):
    """A macro or block rendered through the templates' own environment."""
    from visae.reports.page import _environment

    text = '{% import "macros.html" as show %}' + source
    return _environment().from_string(text).render(**context)


def test_a_page_of_ones_own_extends_the_base():
    source = (
        '{% extends "base.html" %}{% block title %}{{ name }}{% endblock %}'
        "{% block main %}<h1>{{ name }}</h1>{% endblock %}"
    )
    html = rendered(source, name='<x> & "y"')
    assert "<h1>&lt;x&gt; &amp; &#34;y&#34;</h1>" in html
    assert "<title>&lt;x&gt;" in html
    assert '<html lang="en">' in html
    assert "prefers-color-scheme: dark" in html
    assert f"visae {visae.__version__}" in html


def test_a_name_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("feature.html")


def test_a_page_is_written_whole(tmp_path, index):
    from visae.reports.index_page import _about

    assert [p.name for p in tmp_path.iterdir()] == []
    context = _about(index) | {"lines": [], "columns": [], "is_sample": False}
    context |= {"n_live": 3, "n_dead": 1, "flag_counts": []}
    path = write_page(tmp_path / "a" / "page.html", "index.html", **context)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_building_blocks_escape_what_they_are_given():
    evil = '<script>alert("x")</script>'
    html = rendered(
        "{{ show.facts([(e, e)]) }}{{ show.note(e) }}{{ show.verdict('refuted', e) }}"
        "{{ show.picture('a.png', e, e) }}{{ show.chart(svg, e, e) }}",
        e=evil,
        svg=svg_markup(histogram([1], [0, 1], xlabel=evil, ylabel="")),
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 7
    assert "<svg" in html


def test_a_picture_comes_back_from_its_address():
    import base64

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    head, data = picture_uri(Image.fromarray(pixels)).split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def colours_of(scheme):
    """The colours that the style sheet names, by name."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme]))


def contrast(one, other):
    def luminance(colour):
        share = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in share]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_background(scheme):
    colours = colours_of(scheme)
    for text in ("ink", "muted", "accent", "good", "bad"):
        for background in ("paper", "panel"):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
