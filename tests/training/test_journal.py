"""What a run leaves behind: lines of figures, progress, and resume points when they are due."""

import pytest
import torch

from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training import journal
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train
from visae.training.metrics import read_metrics

SITE = "residual@0"
RUNS = {
    "relu": {"sparsity": ReLU(l1=0.02)},
    "batch": {"sparsity": BatchTopK(k=3)},
    "vectors": {"sparsity": TopK(k=3), "control": "random-activations"},
}


def runs(*names):
    return [RunConfig(name=n, n_features=32, learning_rate=3e-3, **RUNS[n]) for n in names]


def config(n_steps=8, **changes):
    options = {"n_tokens": n_steps * 100, "batch_size": 100, "log_steps": 1}
    return TrainConfig(**options | changes)


def test_a_group_may_mix_engines_and_says_which(planted, tmp_path):
    train(planted.store, SITE, runs(*RUNS), tmp_path, config=config())
    said = {name: read_sae_record(tmp_path / name).provenance.engine for name in RUNS}
    assert said["relu"] == "reference"
    assert said["batch"].startswith("numba, encode in ")
    assert said["vectors"] == "none"
    for name in ("relu", "batch"):
        assert {row["engine"] for row in read_metrics(tmp_path / name)} == {said[name]}


def test_a_run_is_taken_up_by_another_engine(planted, tmp_path):
    def stop(told):
        if told.done > 400:
            raise KeyboardInterrupt

    begun = config(engine="numba", checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs("batch"), tmp_path, config=begun, progress=stop)
    train(planted.store, SITE, runs("batch"), tmp_path, config=config(engine="reference"))
    engines = [row["engine"] for row in read_metrics(tmp_path / "batch")]
    assert [name.split(",")[0] for name in engines] == ["numba"] * 4 + ["reference"] * 4
    assert read_sae_record(tmp_path / "batch").provenance.engine == "reference"
    train(planted.store, SITE, runs("batch"), tmp_path / "other", config=config(engine="torch"))
    for name, tensor in load_sae(tmp_path / "other" / "batch").state_dict().items():
        torch.testing.assert_close(
            load_sae(tmp_path / "batch").state_dict()[name], tensor, rtol=1e-2, atol=1e-3
        )


def test_dense_features_are_counted(planted, tmp_path):
    """A feature is dense where it fires on more than a tenth of the tokens; 3 of 32 are rarer."""
    often = [RunConfig(name="a", n_features=32, sparsity=TopK(k=30), learning_rate=3e-3)]
    train(planted.store, SITE, often, tmp_path, config=config(2))
    assert read_metrics(tmp_path / "a")[-1]["dense_share"] > 0.9
    rarely = [RunConfig(name="b", n_features=320, sparsity=TopK(k=1), learning_rate=3e-3)]
    train(planted.store, SITE, rarely, tmp_path, config=config(2))
    assert read_metrics(tmp_path / "b")[-1]["dense_share"] < 0.1


def test_progress_shows_the_figures_of_the_moment(planted, tmp_path):
    told = []
    train(planted.store, SITE, runs("batch"), tmp_path, config=config(2), progress=told.append)
    row = read_metrics(tmp_path / "batch")[-1]
    assert told[-1].note == f"EV {1 - row['nmse']:.3f}, L0 {row['l0']:.1f}, dead {row['dead']}"


def test_progress_of_several_saes_shows_the_least_and_the_largest(planted, tmp_path):
    told = []
    train(planted.store, SITE, runs(*RUNS), tmp_path, config=config(2), progress=told.append)
    rows = [read_metrics(tmp_path / name)[-1] for name in ("relu", "batch")]
    low, high = sorted(1 - row["nmse"] for row in rows)
    assert f"EV {low:.3f} to {high:.3f}, L0 3.0 to " in told[-1].note


@pytest.fixture
def written(monkeypatch, planted, tmp_path):
    """Train, and say after which steps resume points were written."""
    from visae.training import loop

    def run(**changes):
        steps = []
        monkeypatch.setattr(loop, "write_points", lambda _group, step: steps.append(step))
        train(planted.store, SITE, runs("batch"), tmp_path, config=config(**changes))
        return steps

    return run


@pytest.mark.parametrize(
    ("n_tokens", "steps"), [(200, [2, 4, 6]), (250, [3, 5]), (50, list(range(1, 8))), (900, [])]
)
def test_resume_points_come_every_so_many_tokens(written, n_tokens, steps):
    assert written(checkpoint_seconds=1e9, checkpoint_tokens=n_tokens) == steps


class Clock:
    """A clock of which every reading is a second later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


def test_resume_points_come_every_so_many_seconds(written, monkeypatch):
    monkeypatch.setattr(journal, "time", Clock())
    every = written(checkpoint_seconds=0.0)
    assert every == list(range(1, 8))


def test_seconds_count_from_the_last_point(written, monkeypatch):
    """Four readings a step: before and after the wait, for the pace, for the point."""
    monkeypatch.setattr(journal, "time", Clock())
    assert written(checkpoint_seconds=8.0) == [2, 4, 6]


def test_the_mean_of_the_weights_is_what_is_saved(planted, tmp_path):
    kept = {"average_decay": 0.9, "checkpoint_seconds": 0.0}
    (last,) = train(planted.store, SITE, runs("batch"), tmp_path / "last", config=config(30))
    (mean,) = train(planted.store, SITE, runs("batch"), tmp_path, config=config(30, **kept))
    torch.testing.assert_close(mean.W_dec.norm(dim=1), torch.ones(32))
    assert not torch.equal(mean.W_enc, last.W_enc)
    assert (mean.W_enc - last.W_enc).norm() < 0.2 * last.W_enc.norm()
    assert read_sae_record(tmp_path / "batch").provenance.recipe["loop"]["average_decay"] == 0.9


def test_the_mean_survives_an_interruption_bit_for_bit(planted, tmp_path):
    def stop(told):
        if told.done > 1200:
            raise KeyboardInterrupt

    kept = config(20, average_decay=0.9, checkpoint_seconds=0.0)
    (whole,) = train(planted.store, SITE, runs("batch"), tmp_path / "whole", config=kept)
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs("batch"), tmp_path, config=kept, progress=stop)
    (again,) = train(planted.store, SITE, runs("batch"), tmp_path, config=kept)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in whole.state_dict().items())
