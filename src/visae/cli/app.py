"""The program ``visae``: one subcommand a verb, errors as one paragraph with exit code 2."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

import visae
from visae.cli.analysis import EvaluateCommand, IndexCommand, InterveneCommand
from visae.cli.converting import ConvertCommand
from visae.cli.making import RecordCommand
from visae.cli.models import ModelsCommand
from visae.cli.output import Screen
from visae.cli.showing import DemoCommand, DoctorCommand, ReportCommand
from visae.cli.slurm import LongVerb, parse_slurm, submit, without_slurm
from visae.cli.training import TrainCommand
from visae.errors import VisaeError
from visae.storage.atomic import disk_errors

__all__ = ["main"]

_Command = (
    Annotated[RecordCommand, tyro.conf.subcommand("record")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
    | Annotated[IndexCommand, tyro.conf.subcommand("index")]
    | Annotated[InterveneCommand, tyro.conf.subcommand("intervene")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
    | Annotated[ModelsCommand, tyro.conf.subcommand("models")]
    | Annotated[DemoCommand, tyro.conf.subcommand("demo")]
)

_DESCRIPTION = (
    "Scientifically rigorous interpretation of vision models with sparse autoencoders. "
    "record → train → evaluate → index → intervene → report; each verb reads what the one "
    "before wrote. Errors are one paragraph with exit code 2; --traceback shows the whole trace."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 done, 2 an error a user can mend, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        Screen().say(f"visae {visae.__version__}")
        return 0
    show_trace = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    command = tyro.cli(
        _Command,
        prog="visae",
        description=_DESCRIPTION,
        args=given or ["--help"],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    screen = Screen()
    try:
        with screen, disk_errors(Path.cwd()):
            if isinstance(command, LongVerb) and command.slurm is not None:
                _submit(given, command.slurm, screen)
            else:
                command.run(screen)
    except VisaeError as error:
        if show_trace:
            raise
        screen.complain(str(error))
        return 2
    except KeyboardInterrupt:
        screen.complain("Interrupted. Run the same command again: it goes on from here.")
        return 130
    return 0


def _submit(given: Sequence[str], options: str, screen: Screen) -> None:
    job = submit(without_slurm(given), parse_slurm(options))
    screen.say(f"Submitted job {job.job_id}. When it runs, its log is {job.log}")
