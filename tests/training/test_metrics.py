import pytest

from visae.errors import CheckpointError
from visae.training.metrics import append_metrics, cut_metrics, read_metrics


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        append_metrics(tmp_path, {"step": step, "loss": 1 / step})
    return tmp_path


def test_lines_are_read_as_they_were_written(folder):
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30]
    assert read_metrics(folder)[1]["loss"] == 1 / 20


def test_no_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "kept"), [(-1, []), (10, [10]), (25, [10, 20]), (99, [10, 20, 30])]
)
def test_lines_after_a_step_are_cut(folder, step, kept):
    cut_metrics(folder, step)
    assert [row["step"] for row in read_metrics(folder)] == kept
    append_metrics(folder, {"step": 100})
    assert [row["step"] for row in read_metrics(folder)] == [*kept, 100]


def test_a_last_line_cut_short_by_a_kill_is_left_out(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30]
    cut_metrics(folder, 30)
    append_metrics(folder, {"step": 40})
    assert [row["step"] for row in read_metrics(folder)] == [10, 20, 30, 40]


def test_a_damaged_line_is_named(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 20', '{"step" 20'))
    with pytest.raises(CheckpointError, match="Line 2 is damaged"):
        read_metrics(folder)


def test_figures_that_are_no_numbers_survive(tmp_path):
    append_metrics(tmp_path, {"step": 1, "nmse": float("nan"), "loss": float("inf")})
    (row,) = read_metrics(tmp_path)
    assert row["nmse"] != row["nmse"]
    assert row["loss"] == float("inf")
