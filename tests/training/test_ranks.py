"""Two processes that share the SAEs of a group out, against the same group made by one."""

import pytest

from visae.distributed import Ranks
from visae.errors import ConfigError
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.locks import is_locked
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train
from visae.training.metrics import read_metrics

SITE = "residual@0"
SETTINGS = """
from pathlib import Path
from visae.activations.store import ActivationStore
from visae.errors import StoreError
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

runs = [
    RunConfig(name="batch", n_features=32, sparsity=BatchTopK(k=3), learning_rate=3e-3),
    RunConfig(name="topk", n_features=48, sparsity=TopK(k=3), learning_rate=3e-3),
    RunConfig(name="relu", n_features=32, sparsity=ReLU(l1=0.02), learning_rate=3e-3),
]
config = TrainConfig(n_tokens=1200, batch_size=100, log_steps=1, checkpoint_seconds=0.0)
"""
BODY = (
    SETTINGS
    + """
store, out = ActivationStore(Path({store!r})), Path({out!r})
told = []
saes = train(store, "residual@0", runs, out, config=config, progress=told.append, ranks=ranks)
print([sae.n_features for sae in saes], len(told))
"""
)
FAILING = (
    SETTINGS
    + """
import dataclasses
store, out = ActivationStore(Path({store!r})), Path({out!r})
runs[1] = dataclasses.replace(runs[1], learning_rate=1e30)
endless = dataclasses.replace(config, n_tokens=100 * 10**7)
try:
    train(store, "residual@0", runs, out, config=endless, ranks=ranks)
except StoreError as error:
    print(error)
"""
)


def settings():
    names = {"RunConfig": RunConfig, "TrainConfig": TrainConfig}
    names |= {"BatchTopK": BatchTopK, "TopK": TopK, "ReLU": ReLU}
    code = "\n".join(line for line in SETTINGS.splitlines() if not line.startswith("from "))
    exec(code, names)  # noqa: S102
    return names["runs"], names["config"]


def test_two_processes_make_the_saes_of_one(run_ranks, planted, tmp_path):
    runs, config = settings()
    alone = tmp_path / "alone"
    train(planted.store, SITE, runs, alone, config=config)
    out = tmp_path / "together"
    body = BODY.format(store=str(planted.store.folder), out=str(out))
    first, second = run_ranks(body)
    assert first.split("]")[0] == second.split("]")[0] == "[32, 48, 32"
    assert (first.split()[-1], second.split()[-1]) == ("12", "0")
    for run in runs:
        for name in ("sae.safetensors", "sae.json"):
            assert (out / run.name / name).read_bytes() == (alone / run.name / name).read_bytes()
        rows = [read_metrics(folder / run.name) for folder in (out, alone)]
        assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
        assert not is_locked(out / run.name)


def test_a_failure_of_one_process_stops_the_other_at_a_resume_point(run_ranks, planted, tmp_path):
    body = FAILING.format(store=str(planted.store.folder), out=str(tmp_path))
    first, second = run_ranks(body)
    assert "Rank 1 of 2 failed: The loss of topk is" in first
    assert second.startswith("The loss of topk is")
    for name in ("batch", "relu"):
        points = sorted((tmp_path / name / "resume").glob("*.json"))
        assert int(points[-1].stem) == read_metrics(tmp_path / name)[-1]["step"]


def test_processes_without_work_are_refused(planted, tmp_path):
    runs, config = settings()
    with pytest.raises(ConfigError, match=r"4 processes cannot share 3 SAEs out .*--seeds"):
        train(planted.store, SITE, runs, tmp_path, config=config, ranks=Ranks(world_size=4))
    assert not list(tmp_path.iterdir())
