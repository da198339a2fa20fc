import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from visae.errors import FeatureIndexError
from visae.reports.index_page import chosen_features, write_index_report

VOID = {"meta", "img", "input", "br", "hr", "link", "rect", "line"}


class Page(HTMLParser):
    """Every element of a page, with a check that all are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == [], path

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    assert write_index_report(index, out) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def pages(report):
    return {path: Page(path) for path in sorted(report.rglob("*.html"))}


def test_there_is_a_page_for_each_live_feature(report):
    assert sorted(path.name for path in (report / "features").iterdir()) == [
        "0.html",
        "2.html",
        "3.html",
    ]


def test_every_address_leads_to_a_file_of_the_report(report, pages):
    for path, page in pages.items():
        for _, attributes in page.elements:
            for name in ("href", "src"):
                address = attributes.get(name, "")
                if address and not address.startswith(("data:image/png;base64,", "#")):
                    parts = urlsplit(address)
                    assert not parts.scheme, address
                    assert not parts.netloc, address
                    target = (path.parent / unquote(parts.path)).resolve()
                    assert target.is_relative_to(report.resolve())
                    assert target.is_file(), address


def test_nothing_is_loaded_from_elsewhere(pages):
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|@import|url\(", text), path


def test_no_page_has_inline_handlers_or_names_twice(pages):
    for path, page in pages.items():
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), path
        for _, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes), path


def test_every_image_is_described(pages):
    for page in pages.values():
        for image in page.all("img"):
            assert "alt" in image
            if image.get("class") != "under":
                assert image["alt"]


def test_every_page_has_one_heading_a_language_and_a_title(pages):
    for page in pages.values():
        assert len(page.all("h1")) == 1
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("title")) == 1
        assert len(page.all("main")) == 1


def test_names_and_classes_are_escaped(pages):
    for path, page in pages.items():
        assert not page.all("b"), path
        assert "a&b" in "".join(page.text), path
    feature = "".join(next(page for path, page in pages.items() if path.name == "0.html").text)
    assert '<b>"cat" & co</b>' in feature


def test_the_heat_map_says_in_words_where_the_feature_fires(pages):
    page = next(page for path, page in pages.items() if path.name == "0.html")
    said = [image["alt"] for image in page.all("img") if image.get("class") == "over"]
    assert said[0] == "fires on 1 of 8 patches, most (24.0) at row 2, column 4"


def test_a_feature_page_has_every_band(pages):
    text = "".join(next(page for path, page in pages.items() if path.name == "0.html").text)
    for title in ("Top", "Upper", "Middle", "Low", "Random active", "Nearest features"):
        assert title in text


def test_every_control_of_the_table_is_labelled(report, pages):
    page = pages[report / "index.html"]
    assert len(page.all("label")) == len(page.all("input")) == 3
    assert len(page.all("button")) == 8
    assert all(header.get("scope") == "col" for header in page.all("th"))
    rows = [row for row in page.all("tr") if "data-feature" in row]
    assert [row["data-feature"] for row in rows] == ["0", "2", "3"]
    for button in page.all("button"):
        assert all(f"data-{button['data-key']}" in row for row in rows)


def test_images_are_copied_once(report, index):
    shown = {
        example.content_id
        for feature in (0, 2, 3)
        for examples in index.examples(feature).values()
        for example in examples
    }
    assert {path.stem for path in (report / "images").iterdir()} == shown


def test_chosen_features_come_in_the_order_given_dead_ones_too(index, tmp_path):
    told = []
    write_index_report(index, tmp_path, features=[3, 1, 0], progress=told.append)
    page = Page(tmp_path / "index.html")
    rows = [row["data-feature"] for row in page.all("tr") if "data-feature" in row]
    assert rows == ["3", "1", "0"]
    dead = Page(tmp_path / "features/1.html")
    assert "fires on none of the indexed images" in "".join(dead.text)
    links = {a.get("rel"): a["href"] for a in dead.all("a")}
    assert (links["prev"], links["next"]) == ("3.html", "0.html")
    assert [(p.done, p.total) for p in told] == [(1, 3), (2, 3), (3, 3)]


def test_more_features_than_asked_for_are_drawn_at_random(index, tmp_path):
    assert chosen_features(index, 3) == [0, 2, 3]
    assert len(chosen_features(index, 2)) == 2
    assert chosen_features(index, 2) == chosen_features(index, 2)
    write_index_report(index, tmp_path, max_features=2)
    assert "Shown are 2 of the 3 live features, drawn at random" in "".join(
        Page(tmp_path / "index.html").text
    )


def test_a_number_out_of_range_is_refused_before_anything_is_written(index, tmp_path):
    with pytest.raises(FeatureIndexError, match=r"no feature 4.* from 0 to 3"):
        write_index_report(index, tmp_path / "report", features=[0, 4])
    assert not (tmp_path / "report").exists()


def test_the_report_says_whether_a_choice_can_be_confirmed(index, build, tmp_path):
    write_index_report(index, tmp_path / "all", features=[0])
    assert "can be confirmed only on other images" in (tmp_path / "all/index.html").read_text()
    write_index_report(build("half", side="discovery"), tmp_path / "half", features=[0])
    assert "Only the discovery side" in (tmp_path / "half/index.html").read_text()
    assert "of the discovery side" in (tmp_path / "half/features/0.html").read_text()
