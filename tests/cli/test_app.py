"""The program itself: exit codes, one paragraph an error, help, and an interrupt."""

import subprocess
import sys

import pytest

import visae as package
from visae.cli import main
from visae.errors import StoreError


def test_the_version(visae):
    assert visae("--version") == (0, f"visae {package.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_verbs(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    said = capsys.readouterr().out
    for verb in ("record", "train", "evaluate", "index", "intervene", "report", "doctor", "demo"):
        assert verb in said
    assert "--traceback" in said


@pytest.mark.parametrize(
    "verb", ["record", "train", "evaluate", "index", "intervene", "report", "doctor", "demo"]
)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"visae {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recrod"], "recrod"),
        (["record"], "--images"),
        (["train", "--store", "x", "--out", "y", "--k", "many"], "--k"),
        (["train", "--store", "x", "--out", "y", "--kinds", "topk"], "--kind"),
        (["train", "--store", "x", "--out", "y", "--kind", "jumprely"], "jumprely"),
        (["index", "--sae", "x", "--store", "y", "--out", "z", "--side", "left"], "left"),
    ],
)
def test_what_is_typed_wrong_is_told_with_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_paragraph(fails, tmp_path):
    said = fails("doctor", tmp_path / "nowhere")
    assert said.startswith("visae: There is no store, SAE, index or experiment here (")
    assert str(tmp_path / "nowhere") in said


def test_traceback_raises_wherever_it_stands(tmp_path):
    for arguments in (["--traceback", "doctor", "nowhere"], ["doctor", "nowhere", "--traceback"]):
        with pytest.raises(StoreError):
            main(arguments)


def test_markup_in_a_path_is_printed_as_it_is(fails, tmp_path):
    assert "[bold]x[/bold]" in fails("doctor", tmp_path / "[bold]x[" / "bold]")


def test_an_interrupt_says_how_to_go_on(visae, monkeypatch):
    from visae.reports import doctor

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine_installation", interrupt)
    code, _, error = visae("doctor")
    assert code == 130
    assert error == "visae: Interrupted. Run the same command again: it goes on from here.\n"


def test_an_error_of_ours_is_not_dressed_up(monkeypatch):
    """A bug keeps its traceback: only what a user can mend is one paragraph."""
    from visae.reports import doctor

    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(doctor, "examine_installation", fail)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_the_program_and_the_module_are_one():
    command = [sys.executable, "-m", "visae.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"visae {package.__version__}\n"


@pytest.mark.parametrize("module", ["visae", "visae.cli"])
def test_the_program_runs_as_a_module(module):
    command = [sys.executable, "-m", module, "nonsense"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "nonsense" in ran.stdout + ran.stderr
