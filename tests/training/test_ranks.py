"""Two processes that share the SAEs of a group out, against the same group made by one."""

import dataclasses

import pytest
import torch

from visae.distributed import Ranks
from visae.errors import ConfigError
from visae.saes.checkpoint import load_sae
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
    with pytest.raises(
        ConfigError, match=r"4 processes cannot share 3 SAEs out .*share the tokens"
    ):
        train(planted.store, SITE, runs, tmp_path, config=config, ranks=Ranks(world_size=4))
    assert not list(tmp_path.iterdir())


# Sharing the tokens of every batch


SHARED = """
from pathlib import Path
import dataclasses
import torch
from visae.activations.store import ActivationStore
from visae.saes.checkpoint import load_sae
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

store, out = ActivationStore(Path({store!r})), Path({out!r})
common = {{"n_features": 48, "learning_rate": 3e-3}}
runs = [
    RunConfig(name="batch", sparsity=BatchTopK(k=3), **common),
    RunConfig(name="topk", sparsity=TopK(k=3), **common),
    RunConfig(name="relu", sparsity=ReLU(l1=0.02), **common),
    RunConfig(name="untrained", control="untrained", sparsity=BatchTopK(k=3), **common),
]
config = TrainConfig(
    n_tokens=1200, batch_size=100, log_steps=1, checkpoint_seconds=0.0, shared="tokens",
    auxk_alpha=0.0,
)
def stop(told):
    if told.done > 500:
        raise KeyboardInterrupt
"""
BOTH_ENGINES = (
    SHARED
    + """
told = []
for engine in ("reference", "numba"):
    some = runs if engine == "reference" else runs[:2]
    chosen = dataclasses.replace(config, engine=engine)
    saes = train(
        store, "residual@0", some, out / engine, config=chosen, progress=told.append, ranks=ranks
    )
print(len(told), [tuple(sae.W_enc.shape) for sae in saes])
"""
)


@pytest.fixture(scope="module")
def shared(run_ranks, planted, tmp_path_factory):
    """SAEs made by two processes with half of every batch each, and by one; by engine."""
    out = tmp_path_factory.mktemp("shared")
    places = {"store": str(planted.store.folder), "out": str(out / "two")}
    said = run_ranks(BOTH_ENGINES.format(**places))
    assert [text.split()[0] for text in said] == ["24", "0"]
    names = {}
    exec(SHARED.format(**places), names)  # noqa: S102
    for engine in ("reference", "numba"):
        some = names["runs"] if engine == "reference" else names["runs"][:2]
        config = dataclasses.replace(names["config"], engine=engine)
        train(planted.store, SITE, some, out / "one" / engine, config=config)
    return out


CASES = [("reference", name) for name in ("batch", "topk", "relu", "untrained")]
CASES += [("numba", name) for name in ("batch", "topk")]


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_two_halves_of_every_batch_make_the_sae_of_the_whole(shared, engine, name):
    one, two = (load_sae(shared / n / engine / name).state_dict() for n in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-4)
    rows = [read_metrics(shared / n / engine / name) for n in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == (0 if name == "untrained" else 12)
    for one, two in zip(*rows, strict=True):
        for figure in ("step", "loss", "nmse", "l0", "dead", "dense_share"):
            assert two[figure] == pytest.approx(one[figure], rel=1e-3), figure


RESUMED = (
    SHARED
    + """
train(store, "residual@0", runs, out, config=config, progress=print, ranks=ranks)
"""
)
RUNAWAY = (
    SHARED
    + """
from visae.errors import StoreError
runs[1] = dataclasses.replace(runs[1], learning_rate=1e30)
try:
    train(store, "residual@0", runs, out, config=config, ranks=ranks)
except StoreError as error:
    print(error)
"""
)


def test_two_processes_go_on_where_one_stopped(run_ranks, shared, planted, tmp_path):
    places = {"store": str(planted.store.folder), "out": str(tmp_path)}
    names = {}
    exec(SHARED.format(**places), names)  # noqa: S102
    with pytest.raises(KeyboardInterrupt):
        train(
            planted.store,
            SITE,
            names["runs"],
            tmp_path,
            config=names["config"],
            progress=names["stop"],
        )
    said = run_ranks(RESUMED.format(**places))
    assert said[0].count("Progress(") == 7
    assert said[1] == ""
    one, two = (load_sae(f / "topk").state_dict() for f in (shared / "one" / "numba", tmp_path))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-4)
    assert [row["step"] for row in read_metrics(tmp_path / "topk")] == list(range(1, 13))
    assert not list(tmp_path.glob("*/resume"))


def test_a_loss_that_is_no_number_stops_both(run_ranks, planted, tmp_path):
    said = run_ranks(RUNAWAY.format(store=str(planted.store.folder), out=str(tmp_path)))
    for text in said:
        assert text.startswith("The loss of topk is")


def test_a_batch_that_cannot_be_halved_is_refused(planted, tmp_path):
    runs, config = settings()
    odd = dataclasses.replace(config, batch_size=75, shared="tokens")
    with pytest.raises(ConfigError, match="2 processes cannot share batches of 75 tokens"):
        train(planted.store, SITE, runs, tmp_path, config=odd, ranks=Ranks(world_size=2))
    assert not list(tmp_path.iterdir())
