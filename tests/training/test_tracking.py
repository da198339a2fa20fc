"""Figures sent to other programs: what each gets, and what is said where it is not there."""

import sys
import types

import pytest

from visae.errors import ConfigError
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train
from visae.training.metrics import read_metrics

SITE = "residual@0"


def runs():
    names = {"a": "none", "b": "none", "vectors": "random-activations"}
    return [
        RunConfig(name=n, n_features=32, sparsity=TopK(k=3), control=c) for n, c in names.items()
    ]


def config(track, **changes):
    return TrainConfig(n_tokens=800, batch_size=100, log_steps=2, track=track, **changes)


def stop(told):
    if told.done > 400:
        raise KeyboardInterrupt


class Run:
    """A run as trackio and wandb hand it out."""

    def __init__(self, options):
        self.options, self.lines, self.finished = options, [], False

    def log(self, figures, step):
        self.lines.append((step, figures))

    def finish(self):
        self.finished = True


@pytest.fixture(params=["trackio", "wandb"])
def package(request, monkeypatch):
    """The name of a package, and the runs that were begun with a stand-in for it."""
    begun = []

    def init(**options):
        begun.append(Run(options))
        return begun[-1]

    monkeypatch.setitem(sys.modules, request.param, types.SimpleNamespace(init=init))
    return request.param, begun


def test_every_sae_that_learns_is_a_run(package, planted, tmp_path):
    name, begun = package
    train(planted.store, SITE, runs(), tmp_path, config=config(name))
    assert [run.options["name"] for run in begun] == ["a", "b"]
    for run in begun:
        rows = read_metrics(tmp_path / run.options["name"])
        assert [step for step, _ in run.lines] == [row["step"] for row in rows] == [2, 4, 6, 8]
        for (_, figures), row in zip(run.lines, rows, strict=True):
            assert figures == {k: v for k, v in row.items() if k in figures}
            assert {"explained_variance", "l0", "dead", "tokens_per_second"} <= set(figures)
        assert run.options["config"]["run"]["sparsity"] == {"kind": "topk", "k": 3}
        assert run.finished


def test_a_run_is_closed_when_training_stops_and_goes_on(package, planted, tmp_path):
    name, begun = package
    points = {"checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=config(name, **points), progress=stop)
    assert all(run.finished for run in begun)
    train(planted.store, SITE, runs(), tmp_path, config=config(name, **points))
    first, again = begun[0], begun[2]
    assert again.options["name"] == "a"
    assert again.options["resume"] == "allow"
    assert first.options.get("id") == again.options.get("id")
    assert [step for step, _ in again.lines] == [6, 8]


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_package_that_is_not_there_is_named_before_anything_is_done(
    monkeypatch, planted, tmp_path, name
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf'{name} is not installed.*"visae\[track\]"'):
        train(planted.store, SITE, runs(), tmp_path, config=config(name))
    assert not list(tmp_path.iterdir())


def test_without_a_tracker_nothing_is_begun(package, planted, tmp_path):
    train(planted.store, SITE, runs(), tmp_path, config=config(None))
    assert not package[1]
    assert len(read_metrics(tmp_path / "a")) == 4


def scalars(folder):
    """The steps and values of every figure in tensorboard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_reads_the_figures(planted, tmp_path):
    pytest.importorskip("tensorboard")
    train(planted.store, SITE, runs(), tmp_path, config=config("tensorboard"))
    for name in ("a", "b"):
        found = scalars(tmp_path / name)
        rows = read_metrics(tmp_path / name)
        assert [step for step, _ in found["l0"]] == [2, 4, 6, 8]
        for tag, events in found.items():
            assert [value for _, value in events] == pytest.approx([row[tag] for row in rows])
    assert not (tmp_path / "vectors" / "tensorboard").exists()


def test_tensorboard_has_every_step_once_after_an_interruption(planted, tmp_path):
    pytest.importorskip("tensorboard")
    rare = config("tensorboard", checkpoint_tokens=300, checkpoint_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=rare, progress=stop)
    train(planted.store, SITE, runs(), tmp_path, config=rare)
    assert [step for step, _ in scalars(tmp_path / "a")["l0"]] == [2, 4, 6, 8]
