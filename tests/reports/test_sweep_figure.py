import matplotlib as mpl
import pytest
from PIL import Image

from visae.errors import ConfigError
from visae.reports.sweep_figure import sweep_figure, write_sweep_figure
from visae.training.choosing import ChoiceRule
from visae.training.sweep_results import SweepResult, SweepRow


def row(name, l0, nmse, **changes):
    options = {
        "site": "residual@9",
        "target_site": None,
        "kind": "topk",
        "k": 3,
        "target_l0": None,
        "penalty": None,
        "n_features": 48,
        "matryoshka": True,
        "archetypal": False,
        "control": "none",
        "learning_rate": 1e-3,
        "seed": 0,
        "n_tokens": 100,
        "dead": 0,
        "dead_share": 0.0,
        "dense_share": 0.0,
    }
    return SweepRow(name=name, l0=l0, nmse=nmse, **options | changes)


def result(*rows):
    rule = ChoiceRule(largest_l0=32)
    return SweepResult(rule=rule, rule_text=rule.text, choices=(), rows=rows)


ROWS = (
    row("a", 16.0, 0.3, on_front=True),
    row("b", 32.0, 0.2, on_front=True, chosen=True, kind="batch-topk"),
    row("c", 40.0, 0.25, kind="my-kind"),
    row("d", 8.0, 0.5, site="mlp@9", target_site="residual@9"),
    row("e", None, None, control="untrained"),
)


def points(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_a_panel_for_every_site_with_points_front_and_choice():
    figure = sweep_figure(result(*ROWS))
    first, second = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == [
        "residual@9",
        "mlp@9 to residual@9",
    ]
    found = points(first)
    assert found["topk"] == [[16.0, 0.3]]
    assert found["batch-topk"] == [[32.0, 0.2]]
    assert found["my-kind"] == [[40.0, 0.25]]
    assert [[16.0, 0.3], [32.0, 0.2]] in found.values()
    assert [text.get_text() for text in first.texts] == ["b"]
    assert points(second)["topk"] == [[8.0, 0.5]]
    assert "the lowest NMSE" in figure.get_supxlabel()


def test_it_is_written_twice_and_the_same_again(tmp_path):
    png, svg = write_sweep_figure(result(*ROWS), tmp_path)
    before = svg.read_bytes()
    with Image.open(png) as picture:
        assert picture.format == "PNG"
    assert b"batch-topk" in before
    write_sweep_figure(result(*ROWS), tmp_path)
    assert svg.read_bytes() == before


def test_the_settings_of_the_user_stay():
    before = dict(mpl.rcParams)
    sweep_figure(result(*ROWS))
    assert dict(mpl.rcParams) == before


def test_controls_alone_are_nothing_to_draw(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        write_sweep_figure(result(ROWS[-1]), tmp_path)
    assert list(tmp_path.iterdir()) == []
