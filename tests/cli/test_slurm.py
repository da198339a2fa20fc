"""Submitting verbs: the options, the command line handed on, and real jobs on this machine."""

import shutil
import sys

import pytest
import submitit

from visae.activations.store import ActivationStore
from visae.cli import app, slurm
from visae.cli.slurm import SlurmOptions, SubmittedCommand, parse_slurm, submit, without_slurm
from visae.errors import ConfigError, VisaeError


@pytest.fixture
def jobs(monkeypatch):
    """The jobs submitted, each with its process, which is waited for at the end."""
    kept = []
    original = submitit.AutoExecutor.submit

    def keep(self, command):
        kept.append(original(self, command))
        return kept[-1]

    monkeypatch.setattr(submitit.AutoExecutor, "submit", keep)
    yield kept
    for job in kept:
        job._process.wait()


def test_options_are_read_by_key():
    found = parse_slurm("partition=gpu, gpus=4,hours=1.5,memory=64,account=7,nodes=2")
    assert found == SlurmOptions(
        partition="gpu", gpus=4, hours=1.5, memory=64, account="7", nodes=2
    )
    assert found.n_processes == 8
    assert SlurmOptions(nodes=3).n_processes == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu", "'gpu' is not one key=value"),
        ("gpus=", "'gpus=' is not one key=value"),
        ("gpus=1,gpus=2", "'gpus=2' is not one key=value"),
        ("gpus=many", "gpus: 'many' is not a whole number"),
        ("gpuss=3", "unknown key gpuss .did you mean: gpus"),
        ("nodes=0", "--slurm nodes=0"),
        ("hours=nan", "--slurm hours=nan"),
        ("gpus=-1", "--slurm gpus=-1"),
        ("memory=0", "--slurm memory=0"),
    ],
)
def test_options_that_mean_nothing_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_slurm(text)


@pytest.mark.parametrize(
    "given",
    [
        ["record", "--slurm", "gpus=4", "--out", "x"],
        ["record", "--slurm=gpus=4", "--out", "x"],
        ["record", "--out", "x", "--slurm", "gpus=4"],
    ],
)
def test_the_command_goes_on_without_its_slurm_option(given):
    assert without_slurm(given) == ["record", "--out", "x"]


def test_slurm_gets_the_options_in_its_own_words(tmp_path, monkeypatch):
    """No Slurm is needed to see what would be asked of it."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    asked = {}
    monkeypatch.setattr(
        submitit.AutoExecutor, "update_parameters", lambda self, **given: asked.update(given)
    )
    monkeypatch.setattr(
        submitit.AutoExecutor,
        "submit",
        lambda self, command: submitit.LocalJob(self.folder, "17", tasks=[0]),
    )
    options = SlurmOptions(
        partition="gpu", account="lab", nodes=2, gpus=4, memory=96, hours=0.5, logs=str(tmp_path)
    )
    job = submit(["record", "--out", "x"], options)
    assert (job.job_id, job.log) == ("17", tmp_path / "17_0_log.out")
    assert asked == {
        "name": "visae-record",
        "nodes": 2,
        "tasks_per_node": 4,
        "cpus_per_task": 8,
        "timeout_min": 30,
        "gpus_per_node": 4,
        "mem_gb": 96,
        "slurm_partition": "gpu",
        "slurm_account": "lab",
    }


def test_a_machine_without_slurm(fails, record_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    said = fails(*record_arguments(tmp_path / "store", "--slurm", "gpus=1"))
    assert "There is no Slurm on this machine" in said
    assert "leave --slurm out" in said
    assert not (tmp_path / "store").exists()


def test_without_submitit(fails, record_arguments, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    said = fails(*record_arguments(tmp_path / "store", "--slurm", "gpus=1"))
    assert "pip install 'visae[slurm]'" in said


def test_a_verb_of_one_process_takes_no_two(fails):
    said = fails("evaluate", "--sae", "x", "--store", "y", "--slurm", "gpus=2")
    assert "visae evaluate runs as one process, and this would start 2" in said


@pytest.mark.parametrize("verb", ["record", "train", "evaluate", "index", "intervene"])
def test_every_long_verb_has_the_option(verb, capsys):
    with pytest.raises(SystemExit):
        app.main([verb, "--help"])
    assert "--slurm" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recording_by_two_processes_of_a_job(
    visae, record_arguments, tmp_path, monkeypatch, jobs
):
    """The whole way through the program, with submitit's executor for this machine."""

    def submit_here(arguments, options):
        return submit(arguments, options, cluster="local")

    monkeypatch.setattr(app, "submit", submit_here)
    monkeypatch.chdir(tmp_path)
    code, said, _ = visae(
        *record_arguments("store", "--shard-mb", 1, "--slurm", "gpus=2,logs=jobs")
    )
    assert code == 0
    (job,) = jobs
    log = tmp_path / "jobs" / f"{job.job_id}_0_log.out"
    assert said == f"Submitted job {job.job_id}. When it runs, its log is {log}\n"
    assert job.results() == [None, None]
    assert "Recorded 48 images" in log.read_text()
    assert "Recorded" not in log.with_name(f"{job.job_id}_1_log.out").read_text()
    assert ActivationStore(tmp_path / "store").n_images == 48


@pytest.mark.slow
def test_a_job_that_fails_is_known_to_have_failed(tmp_path, monkeypatch, jobs):
    monkeypatch.chdir(tmp_path)
    options = SlurmOptions(cpus=1, logs="jobs")
    submit(["index", "--sae", "x", "--store", "y", "--out", "z"], options, cluster="local")
    with pytest.raises(submitit.core.utils.FailedJobError, match="exit code 2"):
        jobs[0].result()
    assert "visae: There is no activation store here" in jobs[0].stderr()


def test_several_processes_get_what_torchrun_would_give_them(tmp_path, monkeypatch):
    """As seen by the command that each of them runs."""
    seen = []
    monkeypatch.setattr(app, "main", lambda arguments: seen.append(dict(slurm.os.environ)) or 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "stale")
    monkeypatch.setenv("MASTER_PORT", "29999")
    given = {"EXECUTOR": "local", "JOB_ID": "1", "NTASKS": "2", "JOB_NUM_NODES": "1"}
    given |= {"NODEID": "0", "GLOBALID": "1", "LOCALID": "1"}
    for name, value in given.items():
        prefix = "SUBMITIT_" if name == "EXECUTOR" else "SUBMITIT_LOCAL_"
        monkeypatch.setenv(f"{prefix}{name}", value)
    monkeypatch.chdir(tmp_path)
    SubmittedCommand(arguments=("record",), folder=tmp_path, n_processes=2)()
    (found,) = seen
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert found["MASTER_ADDR"] != "stale"


def test_a_preempted_job_is_queued_again_as_it_was(tmp_path):
    command = SubmittedCommand(arguments=("record",), folder=tmp_path)
    assert command.checkpoint().function is command


def test_a_command_that_fails_in_a_job_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "main", lambda arguments: 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VisaeError, match="exit code 2"):
        SubmittedCommand(arguments=("record",), folder=tmp_path)()
