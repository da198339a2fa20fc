import csv
import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from visae.activations.loaders import ShuffledTokens
from visae.distributed import Ranks
from visae.errors import CheckpointError, ConfigError
from visae.saes.checkpoint import load_sae
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.training import sweep as sweep_module
from visae.training.choosing import ChoiceRule
from visae.training.config import RunConfig, TrainConfig
from visae.training.metrics import read_metrics
from visae.training.sweep import train_sweep
from visae.training.sweep_results import sweep_result

CONFIG = TrainConfig(
    n_tokens=3000, batch_size=100, log_steps=5, checkpoint_seconds=0.0, n_dead_tokens=400
)
RULE = ChoiceRule(largest_l0=3.5, largest_dead_share=1.0)


def make_runs():
    options = {"n_features": 48, "learning_rate": 3e-3}
    return [
        RunConfig(name="k2", sparsity=TopK(k=2), **options),
        RunConfig(name="k3", sparsity=BatchTopK(k=3), seed=1, **options),
        RunConfig(name="relu", sparsity=ReLU(l1=0.02), matryoshka=False, **options),
        RunConfig(name="null", sparsity=TopK(k=3), control="untrained", **options),
    ]


def stream_of(planted, **changes):
    options = {"tokens": CONFIG.tokens, "batch_size": CONFIG.batch_size} | changes
    return ShuffledTokens(planted.store, "residual@0", **options)


def sweep(planted, out, runs=None, **options):
    runs = make_runs() if runs is None else runs
    return train_sweep(stream_of(planted), runs, out, config=CONFIG, rule=RULE, **options)


@pytest.fixture(scope="module")
def swept(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, sweep(planted, out)


def weights(out):
    return {path.parent.name: path.read_bytes() for path in out.glob("*/sae.safetensors")}


def test_the_figures_are_those_of_the_last_line(swept):
    out, result = swept
    assert [row.name for row in result.rows] == ["k2", "k3", "relu", "null"]
    for row in result.rows[:3]:
        last = read_metrics(out / row.name)[-1]
        assert (row.nmse, row.l0, row.dead) == (last["nmse"], last["l0"], last["dead"])
        assert row.dead_share == last["dead"] / 48
        assert row.dense_share == last["dense_share"]
        assert row.n_tokens == 3000
    assert result.rows[3].nmse is None
    assert result.rows[3].n_tokens == 0
    settings = [(row.kind, row.k, row.penalty, row.seed, row.control) for row in result.rows]
    assert settings == [
        ("topk", 2, None, 0, "none"),
        ("batch-topk", 3, None, 1, "none"),
        ("relu", None, 0.02, 0, "none"),
        ("topk", 3, None, 0, "untrained"),
    ]


def test_the_choice_follows_the_rule(swept):
    _, result = swept
    within = [row for row in result.rows if row.nmse is not None and row.l0 <= 3.5]
    best = min(within, key=lambda row: row.nmse)
    assert [(choice.sites, choice.chosen) for choice in result.choices] == [
        ("residual@0", best.name)
    ]
    assert [row.name for row in result.rows if row.chosen] == [best.name]
    assert result.rule_text == RULE.text
    assert best.on_front


def test_the_table_is_written_three_times(swept):
    out, result = swept
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["nmse"] for row in rows] == [row.nmse for row in result.rows]
    assert [row["chosen"] for row in rows] == [row.chosen for row in result.rows]
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["k2", "k3", "relu", "null"]
    assert float(lines[0]["nmse"]) == result.rows[0].nmse
    assert lines[3]["nmse"] == ""
    written = json.loads((out / "sweep.json").read_text())
    assert written["rule_text"] == RULE.text
    assert written["rule"]["largest_l0"] == 3.5
    assert [row["name"] for row in written["rows"]] == [row["name"] for row in rows]


def test_the_terminal_table_has_a_line_an_sae(swept):
    table = swept[1].table()
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["k2", "k3", "relu", "null"]
    assert "*" in cells[1]
    assert cells[2][3] == "untrained"


def test_dividing_the_saes_changes_none_of_them(swept, planted, tmp_path, monkeypatch):
    groups = []
    original = sweep_module.train_on

    def train_on(stream, group, *rest, **options):
        groups.append([run.name for run in group])
        return original(stream, group, *rest, **options)

    monkeypatch.setattr(sweep_module, "train_on", train_on)
    sweep(planted, tmp_path, memory_bytes=350_000)
    assert len(groups) > 1
    assert sorted(name for group in groups for name in group) == ["k2", "k3", "null", "relu"]
    assert weights(tmp_path) == weights(swept[0])


def test_an_interrupted_sweep_goes_on(swept, planted, tmp_path):
    def stop(told):
        if told.done > 1500:
            raise KeyboardInterrupt

    first = make_runs()[:2]
    with pytest.raises(KeyboardInterrupt):
        sweep(planted, tmp_path, first, progress=stop)
    assert (tmp_path / "k2" / "resume").is_dir()
    seen = []
    sweep(planted, tmp_path, progress=lambda told: seen.append(told.done))
    assert weights(tmp_path) == weights(swept[0])
    assert len([done for done in seen if done == 500]) == 1  # those begun do not begin again
    again = []
    sweep(planted, tmp_path, progress=again.append)
    assert again == []


def test_one_more_sae_leaves_the_others_as_they_are(swept, planted, tmp_path):
    sweep(planted, tmp_path, make_runs()[:1])
    before = weights(tmp_path)
    result = sweep(planted, tmp_path, make_runs()[:2])
    assert weights(tmp_path)["k2"] == before["k2"]
    assert weights(tmp_path) == {name: weights(swept[0])[name] for name in ("k2", "k3")}
    assert [row.name for row in result.rows] == ["k2", "k3"]
    assert load_sae(tmp_path / "k3").n_features == 48


def test_sites_are_chosen_for_apart(store_of, tmp_path, planted):
    acts = planted.activations[:40]
    store = store_of(tmp_path / "store", {"a@0": acts, "b@0": acts * acts.abs().sqrt()})
    stream = ShuffledTokens(store, "a@0", "b@0", tokens=CONFIG.tokens, batch_size=100)
    made = [
        RunConfig(name=f"{site[0]}{k}", site=site, n_features=32, sparsity=TopK(k=k))
        for site in ("a@0", "b@0")
        for k in (2, 4)
    ]
    rule = ChoiceRule(largest_dead_share=1.0)
    result = train_sweep(stream, made, tmp_path / "out", config=CONFIG, rule=rule)
    assert [(c.sites, c.chosen) for c in result.choices] == [("a@0", "a4"), ("b@0", "b4")]
    strict = sweep_result(made, tmp_path / "out", ChoiceRule(largest_l0=0.5))
    assert [choice.chosen for choice in strict.choices] == [None, None]


def test_bad_runs_are_refused_before_anything_is_trained(planted, tmp_path):
    wrong = [*make_runs()[:1], RunConfig(name="far", n_features=8, site="mlp@7")]
    with pytest.raises(ConfigError, match="no site mlp@7"):
        sweep(planted, tmp_path, wrong)
    with pytest.raises(ConfigError, match="different names"):
        sweep(planted, tmp_path, make_runs()[:1] * 2)
    with pytest.raises(ConfigError, match="k2 needs some"):
        sweep(planted, tmp_path, memory_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_figures_that_are_gone_are_missed(swept, planted, tmp_path):
    sweep(planted, tmp_path, make_runs()[:1])
    (tmp_path / "k2" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="figures of this SAE"):
        sweep(planted, tmp_path, make_runs()[:1])


RANKS = """
from pathlib import Path
from visae.activations.loaders import ShuffledTokens
from visae.activations.store import ActivationStore
from visae.errors import ConfigError
from visae.saes.sparsity import TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.sweep import train_sweep

config = TrainConfig(n_tokens=1000, batch_size=100)
store, out = ActivationStore(Path({store!r})), Path({out!r})
stream = ShuffledTokens(store, "residual@0", tokens=config.tokens, batch_size=100)
names = {names!r}
runs = [RunConfig(name=n, n_features=32, sparsity=TopK(k=3), seed=i) for i, n in enumerate(names)]
try:
    result = train_sweep(stream, runs, out, config=config, memory_bytes={memory}, ranks=ranks)
    print([row.name for row in result.rows])
except ConfigError as error:
    print(error)
"""


def test_two_processes_make_the_sweep_of_one(run_ranks, planted, tmp_path):
    settings = {"store": str(planted.store.folder), "names": ["a", "b", "c", "d"]}
    body = RANKS.format(out=str(tmp_path / "together"), memory=110_000, **settings)
    assert run_ranks(body) == ["['a', 'b', 'c', 'd']\n"] * 2
    alone = RANKS.format(out=str(tmp_path / "alone"), memory=10**9, **settings)
    exec(alone, {"ranks": None})  # noqa: S102
    assert weights(tmp_path / "together") == weights(tmp_path / "alone")
    assert (tmp_path / "together" / "results.csv").is_file()


def test_a_group_with_fewer_saes_than_processes_is_refused_at_once(planted, tmp_path):
    options = {"memory_bytes": 10**9, "ranks": Ranks(world_size=2)}
    with pytest.raises(ConfigError, match="2 processes cannot share 1 SAEs out"):
        sweep_module._groups(
            stream_of(planted), make_runs()[:1], tmp_path, config=CONFIG, **options
        )
    config = dataclasses.replace(CONFIG, shared="tokens")
    (group,) = sweep_module._groups(
        stream_of(planted), make_runs()[:1], tmp_path, config=config, **options
    )
    assert [run.name for run in group] == ["k2"]


def test_memory_is_what_all_ranks_have_together(monkeypatch):
    free = 2**30 + 1000
    monkeypatch.setattr(sweep_module, "free_memory", lambda device: free)
    config = dataclasses.replace(CONFIG, device="cpu", buffer_bytes=100)
    two, far = Ranks(world_size=2, n_local=2), Ranks(world_size=2, n_local=1)
    assert sweep_module._allowance(config, Ranks()) == free - 100
    assert sweep_module._allowance(config, two) == 2 * (free // 2 - 100)
    assert sweep_module._allowance(config, far) == 2 * (free - 100)
    shared = dataclasses.replace(config, shared="tokens")
    assert sweep_module._allowance(shared, two) == free // 2 - 100
    usual = dataclasses.replace(config, buffer_bytes=None)
    assert sweep_module._allowance(usual, Ranks()) == 1000
