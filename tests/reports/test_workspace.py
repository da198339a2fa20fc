"""The pages about experiments, report cards and workspaces: they say what the files say."""

import dataclasses
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from visae.errors import ConfigError, ExperimentError
from visae.evaluation.card import evaluate
from visae.evaluation.config import EvaluateConfig
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.interventions.spec import EditConfig
from visae.reports.card_page import write_card_report
from visae.reports.experiment_page import write_experiment_report
from visae.reports.wording import estimated
from visae.reports.workspace import write_report
from visae.statistics.estimates import Estimate, Interval


class Page(HTMLParser):
    """The text, links, pictures and headings of a page, and what a strict reader would miss."""

    def __init__(self, path):
        super().__init__()
        self.text, self.links, self.pictures, self.headings = [], [], [], []
        self.without_alt, self.scripts = 0, 0
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "a":
            self.links.append(named["href"])
        if tag == "img":
            self.pictures.append(named["src"])
            self.without_alt += "alt" not in named
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)
        self.scripts += tag == "script" and "src" in named

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def lab(make_planted_lab, tmp_path_factory):
    """A planted workspace with an experiment, an index and a report card."""
    lab = make_planted_lab(tmp_path_factory.mktemp("workspace"))
    lab.result = lab.run("red")
    index = lab.folder / "features" / "hand@planted"
    build_index(lab.sae_dir, lab.store, index, config=IndexConfig(side="discovery"))
    settings = EvaluateConfig(n_resamples=1000, n_permutations=20)
    evaluate(lab.sae_dir, lab.store, config=settings).write(lab.sae_dir)
    return lab


def test_the_experiment_page_says_what_the_result_says(lab, tmp_path):
    folder = lab.folder / "experiments" / "red"
    path = write_experiment_report(folder, lab.store, lab.store.source(), out=tmp_path / "a.html")
    page, result = Page(path), lab.result
    assert result.hypothesis in page.words
    assert result.verdict.label.capitalize() + "." in page.words
    for number in (result.effect, result.baseline, result.edited):
        assert estimated(number) in page.words
    for control in result.controls:
        assert control.name in page.words
        assert estimated(control.difference) in page.words
    for change in result.classes:
        assert estimated(change.outcome_change) in page.words
    assert result.spec_sha256[:12] in page.words
    assert result.command in page.words
    assert "This result confirms nothing" not in page.words


def test_the_experiment_page_is_one_file_that_needs_no_network(lab, tmp_path):
    folder = lab.folder / "experiments" / "red"
    path = write_experiment_report(folder, lab.store, lab.store.source(), out=tmp_path / "a.html")
    page = Page(path)
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    assert len(page.pictures) == 4 * len(lab.result.most_affected)
    assert page.without_alt == 0
    assert page.scripts == 0
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page.html)
    assert page.headings[0] == "h1"
    assert page.headings.count("h1") == 1


def test_an_exploratory_result_is_marked_as_one(lab):
    spec = dataclasses.replace(lab.spec(), edit=EditConfig(operation="scale", value=0.5))
    lab.run("half", spec, exploratory=True)
    folder = lab.folder / "experiments" / "half"
    page = Page(write_experiment_report(folder, lab.store, lab.store.source()))
    assert "Exploratory: it was run with --exploratory" in page.words
    assert "This result confirms nothing" in page.words
    assert "multiplied by 0.5" in page.words
    shutil.rmtree(folder)


def test_an_unfinished_experiment_has_no_page(lab, tmp_path):
    with pytest.raises(ExperimentError, match="no finished experiment"):
        write_experiment_report(tmp_path, lab.store, lab.store.source())


def test_the_card_page_shows_every_metric_beside_its_nulls(lab, tmp_path):
    page = Page(write_card_report(lab.sae_dir, tmp_path / "card.html"))
    from visae.evaluation.card import read_card

    card = read_card(lab.sae_dir)
    for row in card.rows:
        assert row.title in page.words
        if row.value.value is None:
            assert row.value.note in page.words
        else:
            assert estimated(row.value) in page.words
        for name, null in row.nulls.items():
            assert f"{name} {estimated(null)}" in page.words
    assert [c.name for c in card.classes] == ["blue", "red"]


def test_the_workspace_page_leads_everywhere(lab, tmp_path):
    front = write_report(lab.folder, tmp_path / "report")
    page = Page(front)
    assert lab.result.hypothesis in page.words
    relative = [link for link in page.links if not link.startswith("#")]
    assert {"experiments/red.html", "saes/hand.html", "features/hand@planted/index.html"} <= set(
        relative
    )
    for target in (*relative, *page.pictures):
        assert (front.parent / target).is_file()
    with Image.open(front.parent / "features" / "hand@planted" / "overview.png") as sheet:
        assert np.asarray(sheet.convert("RGB")).std() > 10


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("experiments/red", "Against its controls"),
        ("saes/hand", "Report card of"),
        ("features/hand@planted", "Features of"),
    ],
)
def test_a_part_of_a_workspace_has_its_own_report(lab, tmp_path, part, words):
    page = write_report(lab.folder / part, tmp_path / "part")
    assert page.name == "index.html"
    assert words in Page(page).words


def test_nothing_to_report_on_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nothing here to report on"):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (-0.0557, -0.0692, -0.0456, "−0.0557 (−0.0692 to −0.0456)"),
        (0.672, 0.612, 0.725, "0.672 (0.612 to 0.725)"),
        (32.15, 31.3, 132.3, "32 (31 to 132)"),
        (-0.000006, -0.00002, 0.00003, "−0.0000 (−0.0000 to 0.0000)"),
        (0.0, 0.0, 0.0, "0 (0 to 0)"),
    ],
)
def test_estimates_are_written_to_one_precision(value, low, high, text):
    interval = Interval(low=low, high=high, level=0.95)
    assert estimated(Estimate(value=value, interval=interval, n_images=9, n_units=9)) == text


def test_an_estimate_without_interval_or_value_says_so():
    missing = Estimate(value=None, interval=None, n_images=1, n_units=1, note="too few")
    assert estimated(missing) == "n/a"
    assert estimated(Estimate(value=0.25, interval=None, n_images=1, n_units=1)) == "0.250"
