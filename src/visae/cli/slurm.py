"""Run a long verb as a Slurm job: the same command, submitted instead of run here.

``visae record … --slurm partition=gpu,gpus=4,hours=12`` submits ``visae record …`` through
submitit and says where its log is. A job that is preempted, or runs out of time, is queued again
with the same command, which resumes. Several processes find each other through torchrun's
environment variables.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visae.errors import ConfigError, VisaeError
from visae.storage.records import from_plain

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

__all__ = [
    "LongVerb",
    "SlurmOptions",
    "SubmittedCommand",
    "SubmittedJob",
    "parse_slurm",
    "submit",
    "without_slurm",
]

_FLAG = "--slurm"
_VERBS_OF_SEVERAL_PROCESSES = ("record", "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongVerb:
    """What every verb that can take hours offers besides its own options."""

    slurm: str | None = None
    """Submit to Slurm instead of running here, for example partition=gpu,gpus=4,hours=12."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What to ask Slurm for: the keys of ``--slurm``."""

    partition: str | None = None
    """Partition; without it, the cluster's default."""
    account: str | None = None
    """Account that pays; without it, your default."""
    nodes: int = 1
    """Nodes."""
    gpus: int = 0
    """GPUs on each node; each gets a process of its own."""
    cpus: int = 8
    """CPU cores for each process."""
    memory: int | None = None
    """Memory of each node in GB; without it, the cluster's default."""
    hours: float = 24.0
    """Time limit; a job that runs out of it is queued again and resumes."""
    requeues: int = 20
    """How many times it may run out of time."""
    logs: str = "slurm"
    """Folder of the job's scripts and logs, relative to where you submit."""

    def __post_init__(self) -> None:
        numbers = {"nodes": self.nodes, "cpus": self.cpus, "hours": self.hours}
        if self.memory is not None:
            numbers["memory"] = self.memory
        wrong = [f"{name}={value}" for name, value in numbers.items() if not value > 0]
        wrong += [
            f"{name}={value}"
            for name, value in (("gpus", self.gpus), ("requeues", self.requeues))
            if value < 0
        ]
        if wrong:
            raise ConfigError(
                "A job needs a positive number of everything",
                where=f"{_FLAG} {','.join(wrong)}",
                fix="Correct these keys",
            )

    @property
    def processes_per_node(self) -> int:
        """One a GPU, and one where there is no GPU."""
        return max(1, self.gpus)

    @property
    def n_processes(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes_per_node


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A job in the queue."""

    job_id: str
    """Its number."""
    log: Path
    """What its first process prints; it exists once the job has started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmittedCommand:
    """What the job calls, in each of its processes."""

    arguments: tuple[str, ...]
    """The command line after ``visae``."""
    folder: Path
    """Where it was typed; relative paths mean the same there."""
    n_processes: int = 1
    """Processes of the job."""

    def __call__(self) -> None:
        """Run the command, as a rank of its group where there are several."""
        from submitit.helpers import TorchDistributedEnvironment

        from visae.cli.app import main

        if self.n_processes > 1:
            # Every rank sees all GPUs of its node and takes the one of its local rank.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.chdir(self.folder)
        code = main(self.arguments)
        if code:
            raise VisaeError(
                f"The submitted command ended with exit code {code}",
                where=f"visae {' '.join(self.arguments)}",
                fix="Do what its message in this log says, and submit it again: it resumes",
            )

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit queues when Slurm is about to stop the job: the same command resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def parse_slurm(text: str) -> SlurmOptions:
    """The options that ``--slurm`` means by ``key=value,key=value``.

    Raises:
        ConfigError: naming a key that is unknown, repeated or mistyped.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(SlurmOptions)}
    plain: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or key in plain:
            raise ConfigError(
                f"'{part}' is not one key=value, each key once",
                where=f"{_FLAG} {text}",
                fix=f"Write it like partition=gpu,gpus=4,hours=12; the keys: {', '.join(kinds)}",
            )
        plain[key] = _typed(value, kinds.get(key))
    return from_plain(SlurmOptions, plain, where=f"{_FLAG} {text}")


def submit(
    arguments: Sequence[str],
    options: SlurmOptions,
    *,
    cluster: Literal["slurm", "local"] = "slurm",
) -> SubmittedJob:
    """Submit a command line (without ``--slurm``); ``local`` runs it on this machine instead.

    Raises:
        ConfigError: when submitit or Slurm is not there, or the verb runs as one process only and
            several are asked for.
    """
    verb = arguments[0]
    if options.n_processes > 1 and verb not in _VERBS_OF_SEVERAL_PROCESSES:
        raise ConfigError(
            f"visae {verb} runs as one process, and this would start {options.n_processes}",
            where=f"{_FLAG} nodes={options.nodes},gpus={options.gpus}",
            fix="Ask for one node with at most one GPU",
        )
    command = SubmittedCommand(
        arguments=tuple(arguments), folder=Path.cwd(), n_processes=options.n_processes
    )
    executor = _executor(options, cluster)
    executor.update_parameters(**_parameters(options, verb, cluster))
    job = executor.submit(command)
    return SubmittedJob(job_id=str(job.job_id), log=Path(job.paths.stdout))


def without_slurm(arguments: Sequence[str]) -> list[str]:
    """A command line without ``--slurm`` and its value."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == _FLAG:
            next(rest, None)
        elif not argument.startswith(f"{_FLAG}="):
            kept.append(argument)
    return kept


def _executor(options: SlurmOptions, cluster: str) -> Any:
    """The executor of submitit for a cluster that is there."""
    try:
        import submitit
    except ImportError as failure:
        raise ConfigError(
            "Submitting to Slurm needs submitit, which is not installed",
            where=_FLAG,
            fix="Run pip install 'visae[slurm]'",
        ) from failure
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "There is no Slurm on this machine: srun is not found",
            where=_FLAG,
            fix="Submit from a login node of the cluster, or leave --slurm out to run here",
        )
    limits = {f"{cluster}_max_num_timeout": options.requeues}
    return submitit.AutoExecutor(folder=Path(options.logs).resolve(), cluster=cluster, **limits)


def _parameters(options: SlurmOptions, verb: str, cluster: str) -> dict[str, Any]:
    """The options, named as submitit names them."""
    parameters: dict[str, Any] = {
        "name": f"visae-{verb}",
        "nodes": options.nodes,
        "tasks_per_node": options.processes_per_node,
        "cpus_per_task": options.cpus,
        "timeout_min": max(1, round(options.hours * 60)),
    }
    if options.gpus:
        parameters["gpus_per_node"] = options.gpus
    if options.memory is not None:
        parameters["mem_gb"] = options.memory
    if cluster == "slurm":
        named = {"slurm_partition": options.partition, "slurm_account": options.account}
        parameters |= {key: value for key, value in named.items() if value is not None}
    return parameters


def _typed(value: str, kind: object) -> Any:
    """The value as the number its key means; text that is no number is refused later, by name."""
    for number, kinds in ((int, (int, int | None)), (float, (float,))):
        if kind in kinds:
            try:
                return number(value)
            except ValueError:
                return value
    return value
