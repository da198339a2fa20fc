"""What the program draws: results on standard output, all else on standard error."""

import pytest
from rich.table import Table

from visae.cli import output
from visae.cli.output import Screen
from visae.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(output, "time", clock)
    return clock


def step(done, *, total=100, stage="record", note=""):
    return Progress(stage=stage, done=done, total=total, unit="images", note=note)


def test_results_and_complaints_go_different_ways(capsys):
    screen = Screen()
    screen.say("a [bold]result[/bold] of 1,234 images")
    screen.complain("a [red]complaint[/red]")
    captured = capsys.readouterr()
    assert captured.out == "a [bold]result[/bold] of 1,234 images\n"
    assert captured.err == "visae: a [red]complaint[/red]\n"


def test_a_long_line_is_not_broken(capsys):
    Screen().say("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_a_table_is_drawn(capsys):
    table = Table("metric", "value")
    table.add_row("NMSE", "0.2")
    Screen().say(table)
    assert "NMSE" in capsys.readouterr().out


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, clock):
    with Screen() as screen:
        screen.progress(step(0))
        for second in range(1, 26):
            clock.now = 100.0 + second
            screen.progress(step(2 * second, note="EV 0.5"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "record: 0/100 images",
        "record: 22/100 images, 2.0/s, EV 0.5, 39 s left",
        "record: 44/100 images, 2.0/s, EV 0.5, 28 s left",
    ]


def test_what_was_done_before_an_interruption_is_no_speed(capsys, clock):
    screen = Screen()
    screen.progress(step(80))
    clock.now += 20
    screen.progress(step(90))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "record: 90/100 images, 0.5/s, 20 s left"


def test_a_stage_that_starts_again_is_timed_again(capsys, clock):
    screen = Screen()
    screen.progress(step(100))
    clock.now += 50
    screen.progress(step(0))
    clock.now += 20
    screen.progress(step(40))
    assert capsys.readouterr().err.splitlines()[-1] == "record: 40/100 images, 2.0/s, 30 s left"


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch, capsys, clock):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with Screen() as screen:
        for done in (0, 50, 100):
            clock.now += 1
            screen.progress(step(done))
            screen.progress(step(done, stage="probe", note="fold 2"))
        assert len(screen._tasks) == 2
        tasks = {task.description: task for task in screen._bars.tasks}
        assert tasks["record"].completed == 100
        assert not tasks["record"].visible
        assert "fold 2" in tasks["probe"].fields["figures"]
    assert capsys.readouterr().out == ""
