import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from visae.activations.loaders import ShuffledTokens
from visae.activations.token_filter import TokenFilter
from visae.errors import CheckpointError, ConfigError, StoreError
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.codes import SparseCodes
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.locks import exclusive
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train, train_on
from visae.training.metrics import read_metrics

SITE = "residual@0"
TIMES = {"tokens_per_second", "loader_wait_share"}


def config(n_steps=30, **changes):
    defaults = {"batch_size": 100, "log_steps": 1, "checkpoint_seconds": 0.0, "n_dead_tokens": 400}
    options = defaults | changes
    return TrainConfig(n_tokens=n_steps * options["batch_size"], **options)


def runs(**changes):
    """Three SAEs that learn and two controls."""
    made = {
        "relu": {"sparsity": ReLU(l1=0.02), "n_features": 32},
        "topk": {"sparsity": TopK(k=3), "n_features": 48, "seed": 1},
        "batch": {"sparsity": BatchTopK(k=3), "n_features": 160, "matryoshka": False},
        "untrained": {"sparsity": BatchTopK(k=3), "n_features": 32, "control": "untrained"},
        "vectors": {"sparsity": TopK(k=3), "n_features": 32, "control": "random-activations"},
    }
    return [RunConfig(name=name, learning_rate=3e-3, **o | changes) for name, o in made.items()]


def stop_after(n_steps):
    """A progress callback like a person who presses Ctrl-C."""

    def progress(told):
        if told.done > n_steps * 100:
            raise KeyboardInterrupt

    return progress


def results(out):
    """Everything of a run that must not depend on interruptions: weights, records, figures."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name in ("sae.safetensors", "sae.json"):
            found[name] = path.read_bytes()
    for folder in out.iterdir():
        rows = read_metrics(folder)
        found[folder.name] = [{k: v for k, v in r.items() if k not in TIMES} for r in rows]
    return found


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    """The five SAEs trained without interruption, with resume points at every step."""
    out = tmp_path_factory.mktemp("whole")
    train(planted.store, SITE, runs(), out, config=config())
    return out


# Results


def test_every_run_has_its_sae_and_nothing_else(whole):
    assert sorted(path.name for path in whole.iterdir()) == sorted(run.name for run in runs())
    for folder in whole.iterdir():
        names = {path.name for path in folder.iterdir()}
        assert names - {"metrics.jsonl"} == {".lock", "sae.json", "sae.safetensors"}


def test_the_trained_saes_are_returned_in_order(planted, whole):
    saes = train(planted.store, SITE, runs(), whole, config=config())
    assert [sae.n_features for sae in saes] == [32, 48, 160, 32, 32]
    assert [sae.config.sparsity.kind for sae in saes[:3]] == ["relu", "topk", "batch-topk"]
    for sae, run in zip(saes, runs(), strict=True):
        assert torch.equal(sae.W_enc, load_sae(whole / run.name).W_enc)


def test_the_group_is_bit_equal_to_single_runs(planted, whole, tmp_path):
    for run in runs():
        train(planted.store, SITE, [run], tmp_path, config=config())
    assert results(tmp_path) == results(whole)


def test_the_order_of_the_group_does_not_matter(planted, whole, tmp_path):
    train(planted.store, SITE, runs()[::-1], tmp_path, config=config())
    assert results(tmp_path) == results(whole)


def test_another_seed_gives_another_sae(planted, whole, tmp_path):
    train(planted.store, SITE, runs(seed=9)[:1], tmp_path, config=config())
    assert results(tmp_path)["relu/sae.safetensors"] != results(whole)["relu/sae.safetensors"]


def test_the_normalisation_is_that_of_the_store(planted, whole):
    tokens = planted.activations.flatten(0, 1).double()
    for run in runs():
        sae = load_sae(whole / run.name)
        torch.testing.assert_close(sae.mean.double(), tokens.mean(0), rtol=1e-6, atol=1e-6)
        normal = sae.normalise(tokens).double()
        assert float(normal.square().sum(1).mean()) == pytest.approx(16, rel=1e-5)


def test_metrics_have_a_line_a_step(planted, whole):
    rows = read_metrics(whole / "batch")
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["tokens"] for row in rows] == list(range(100, 3001, 100))
    for row in rows:
        assert row["explained_variance"] == 1 - row["nmse"]
        assert row["learning_rate"] == 3e-3 * config().rate_schedule.factor(row["step"] - 1, 30)
        assert 0 <= row["dead"] <= 160
        assert 0 <= row["loader_wait_share"] <= 1
        assert row["l0"] == 3.0
    assert max(row["dead"] for row in rows) > 0
    record = read_sae_record(whole / "batch")
    assert record.metrics == {key: rows[-1][key] for key in ("loss", "nmse", "l0", "dead")}


def test_lines_come_every_few_steps_and_at_the_end(planted, tmp_path):
    train(planted.store, SITE, runs()[:1], tmp_path, config=config(25, log_steps=10))
    assert [row["step"] for row in read_metrics(tmp_path / "relu")] == [10, 20, 25]


def test_the_record_says_how_the_sae_was_made(planted, whole):
    made = read_sae_record(whole / "topk").provenance
    assert made.model == planted.store.record.identity
    assert (made.site, made.tokens, made.seed, made.control) == (SITE, "patches", 1, "none")
    assert made.store_digest == planted.store.digest
    assert made.n_tokens == 3000
    assert made.recipe["loop"]["batch_size"] == 100
    assert made.recipe["run"]["sparsity"] == {"kind": "topk", "k": 3}


def test_controls_are_not_trained(planted, whole):
    for name in ("untrained", "vectors"):
        assert read_sae_record(whole / name).provenance.n_tokens == 0
        assert read_sae_record(whole / name).metrics == {}
        assert read_metrics(whole / name) == []
    tokens = planted.activations.flatten(0, 1)
    vectors = load_sae(whole / "vectors")
    directions = torch.nn.functional.normalize(vectors.normalise(tokens), dim=1)
    best = (vectors.W_dec @ directions.T).max(1)
    torch.testing.assert_close(best.values, torch.ones(32))
    assert len(best.indices.unique()) == 32


def test_controls_alone_need_no_steps(planted, tmp_path):
    told = []
    made = train(planted.store, SITE, runs()[3:], tmp_path, config=config(), progress=told.append)
    assert told == []
    assert made[0].encode(planted.activations[0]).shape == (20, 32)


def test_progress_counts_tokens(planted, tmp_path):
    told = []
    train(planted.store, SITE, runs()[:2], tmp_path, config=config(5), progress=told.append)
    assert [p.done for p in told] == [100, 200, 300, 400, 500]
    assert {(p.total, p.unit, p.stage) for p in told} == {(500, "tokens", "train")}


# Interruption


@pytest.mark.parametrize("n_steps", [0, 1, 13, 29])
def test_an_interrupted_group_resumes_bit_for_bit(planted, whole, tmp_path, n_steps):
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=config(), progress=stop_after(n_steps))
    assert not list(tmp_path.glob("*/sae.json"))
    told = []
    train(planted.store, SITE, runs(), tmp_path, config=config(), progress=told.append)
    assert told[0].done == (n_steps + 1) * 100
    assert results(tmp_path) == results(whole)


def test_several_interruptions_change_nothing(planted, whole, tmp_path):
    for n_steps in (4, 9, 9, 20):
        with pytest.raises(KeyboardInterrupt):
            train(
                planted.store, SITE, runs(), tmp_path, config=config(), progress=stop_after(n_steps)
            )
    train(planted.store, SITE, runs(), tmp_path, config=config())
    assert results(tmp_path) == results(whole)


def test_without_a_resume_point_training_starts_anew(planted, whole, tmp_path):
    rare = config(checkpoint_seconds=1e9)
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=rare, progress=stop_after(20))
    assert not list(tmp_path.glob("*/resume"))
    train(planted.store, SITE, runs(), tmp_path, config=rare)
    assert results(tmp_path) == results(whole)


def test_a_lost_resume_point_of_one_sae_is_made_up_from_the_one_before(planted, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=config(), progress=stop_after(10))
    newest = max((tmp_path / "topk" / "resume").glob("*.json"))
    newest.unlink()
    told = []
    train(planted.store, SITE, runs(), tmp_path, config=config(), progress=told.append)
    assert told[0].done == 1000
    assert results(tmp_path) == results(whole)


def test_stale_points_of_one_sae_do_not_hold_up_the_group(planted, whole, tmp_path):
    """One SAE was begun alone; in the group all begin anew, and resume again."""
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs()[:1], tmp_path, config=config(), progress=stop_after(20))
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=config(), progress=stop_after(6))
    told = []
    train(planted.store, SITE, runs(), tmp_path, config=config(), progress=told.append)
    assert told[0].done == 700
    assert results(tmp_path) == results(whole)


def test_a_kill_between_two_checkpoints_is_made_good(planted, whole, tmp_path, monkeypatch):
    from visae.training import loop

    n_saved = []

    def save_two(sae, folder, **options):
        if len(n_saved) == 2:
            raise KeyboardInterrupt
        n_saved.append(folder)
        return original(sae, folder, **options)

    original = loop.save_sae
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_sae", save_two)
        with pytest.raises(KeyboardInterrupt):
            train(planted.store, SITE, runs(), tmp_path, config=config())
    first = (tmp_path / "relu" / "sae.safetensors").stat().st_mtime_ns
    train(planted.store, SITE, runs(), tmp_path, config=config())
    assert (tmp_path / "relu" / "sae.safetensors").stat().st_mtime_ns == first
    assert results(tmp_path) == results(whole)


KILLED = """
import sys
from pathlib import Path
from visae.activations.store import ActivationStore
from visae.saes.sparsity import BatchTopK, TopK
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

def progress(told):
    print(told.done // 100, flush=True)

runs = [
    RunConfig(name="topk", sparsity=TopK(k=3), n_features=48, seed=1, learning_rate=3e-3),
    RunConfig(
        name="batch", sparsity=BatchTopK(k=3), n_features=160, matryoshka=False, learning_rate=3e-3
    ),
]
config = TrainConfig(
    n_tokens=3000, batch_size=100, log_steps=1, checkpoint_seconds=0.0, n_dead_tokens=400
)
train(
    ActivationStore(Path(sys.argv[1])), "residual@0", runs, Path(sys.argv[2]),
    config=config, progress=progress,
)
"""


def test_a_killed_group_resumes_bit_for_bit(planted, whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(planted.store.folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 12:
                break
        os.kill(process.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("*/sae.json"))
    leftover = tmp_path / "topk" / "resume" / ".00000013.safetensors.0123abcd.tmp"
    leftover.write_bytes(b"half")
    told = []
    train(planted.store, SITE, runs()[1:3], tmp_path, config=config(), progress=told.append)
    assert told[0].done >= 1200
    expected = {n: v for n, v in results(whole).items() if n.split("/")[0] in ("topk", "batch")}
    assert results(tmp_path) == expected


def test_one_process_trains_in_a_folder_at_a_time(planted, tmp_path):
    with exclusive(tmp_path / "topk"), pytest.raises(StoreError, match="Another process"):
        train(planted.store, SITE, runs(), tmp_path, config=config())


# Finished and other runs


def test_a_finished_run_is_not_trained_again(planted, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}
    told = []
    train(planted.store, SITE, runs(), whole, config=config(), progress=told.append)
    assert told == []
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"} == before


def test_a_finished_run_is_not_trained_again_in_a_larger_group(planted, whole, tmp_path):
    train(planted.store, SITE, runs()[:1], tmp_path, config=config())
    written = (tmp_path / "relu" / "sae.json").stat().st_mtime_ns
    train(planted.store, SITE, runs(), tmp_path, config=config())
    assert (tmp_path / "relu" / "sae.json").stat().st_mtime_ns == written
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 50}, r"loop\.n_tokens: 3000 then, 1500 now.*batch_size: 100 then, 50 now"),
        ({"data_seed": 3}, r"loop\.data_seed: 0 then, 3 now"),
        ({"n_steps": 20}, r"loop\.n_tokens: 3000 then, 2000 now"),
        ({"auxk_alpha": 0.5}, r"loop\.auxk_alpha: 0\.03125 then, 0\.5 now"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_of_the_loop_are_named(planted, whole, tmp_path, changes, said, finished):
    out = whole
    if not finished:
        out = tmp_path
        with pytest.raises(KeyboardInterrupt):
            train(planted.store, SITE, runs(), out, config=config(), progress=stop_after(3))
    with pytest.raises(CheckpointError, match=f"had other settings .*{said}.*same settings"):
        train(planted.store, SITE, runs(), out, config=config(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": TopK(k=4)}, r"run\.sparsity\.k: 3 then, 4 now"),
        ({"sparsity": BatchTopK(k=3)}, r"run\.sparsity\.kind: 'topk' then, 'batch-topk' now"),
        ({"n_features": 64}, r"run\.n_features: 48 then, 64 now"),
        ({"seed": 2}, r"run\.seed: 1 then, 2 now"),
        ({"learning_rate": None}, r"run\.learning_rate: 0\.003 then, None now"),
    ],
)
def test_other_settings_of_an_sae_are_named(planted, whole, changes, said):
    run = dataclasses.replace(runs()[1], **changes)
    with pytest.raises(CheckpointError, match=said):
        train(planted.store, SITE, [run], whole, config=config())


def test_another_store_is_named(make_planted, whole):
    other = make_planted(seed=5)
    with pytest.raises(CheckpointError, match="data: '"):
        train(other.store, SITE, runs(), whole, config=config())


def test_what_does_not_shape_the_sae_may_change(planted, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(planted.store, SITE, runs(), tmp_path, config=config(), progress=stop_after(10))
    train(planted.store, SITE, runs(), tmp_path, config=config(log_steps=7, checkpoint_seconds=60))
    for run in runs():
        a, b = (out / run.name / "sae.safetensors" for out in (tmp_path, whole))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_runs_need_different_names(planted, tmp_path, names):
    group = [RunConfig(name=name, n_features=32, sparsity=TopK(k=2)) for name in names]
    with pytest.raises(ConfigError, match="different names"):
        train(planted.store, SITE, group, tmp_path, config=config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_features": 30}, "multiple of 16"),
        ({"sparsity": TopK(k=49)}, r"k is 49 and n_features is 48 \(sparsity topk\)"),
        ({"sparsity": BatchTopK(k=49), "matryoshka": False}, "k is 49 and n_features is 48"),
    ],
)
def test_an_impossible_sae_is_refused_before_anything_is_written(planted, tmp_path, changes, said):
    group = [runs()[0], dataclasses.replace(runs()[1], **changes)]
    with pytest.raises(ConfigError, match=said):
        train(planted.store, SITE, group, tmp_path, config=config())
    assert not list(tmp_path.iterdir())


def test_runs_of_one_group_can_read_different_sites(planted, tmp_path, store_of):
    tables = {SITE: planted.activations, "mlp@1": 3 * planted.activations[..., :8]}
    store = store_of(tmp_path / "store", tables, shard_bytes=30_000)
    group = [
        RunConfig(name=name, n_features=32, sparsity=TopK(k=3), site=site)
        for name, site in (("own", "mlp@1"), ("default", None))
    ]
    saes = train(store, SITE, group, tmp_path, config=config())
    assert [sae.d_model for sae in saes] == [8, 16]
    alone = dataclasses.replace(group[0], name="alone", site=None)
    (again,) = train(store, "mlp@1", [alone], tmp_path, config=config())
    assert torch.equal(again.W_enc, saes[0].W_enc)
    assert float(again.scale) == pytest.approx(store.statistics("mlp@1").scale)
    made = read_sae_record(tmp_path / "own").provenance
    assert (made.site, made.images) == ("mlp@1", None)


@pytest.fixture(scope="module")
def two_sites(planted, tmp_path_factory, store_of):
    """The planted tokens, and a rotation of them at another site; a third site is narrower."""
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    tables = {SITE: planted.activations, "mlp@1": 3 * planted.activations @ rotation + 1}
    tables["narrow"] = planted.activations[..., :8]
    return store_of(tmp_path_factory.mktemp("two") / "store", tables, shard_bytes=30_000)


def transcoder(target):
    return RunConfig(
        name="a", n_features=64, sparsity=TopK(k=4), target_site=target, learning_rate=1e-2
    )


def test_a_transcoder_reads_one_site_and_gives_another(two_sites, tmp_path):
    (sae,) = train(two_sites, SITE, [transcoder("mlp@1")], tmp_path, config=config(60))
    torch.testing.assert_close(sae.mean.double(), two_sites.statistics(SITE).mean)
    torch.testing.assert_close(sae.target_mean.double(), two_sites.statistics("mlp@1").mean)
    x, y = (next(two_sites.shards(site)).activations.flatten(0, 1) for site in (SITE, "mlp@1"))
    nmse = float((sae(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert nmse < 0.5
    assert nmse == pytest.approx(read_metrics(tmp_path / "a")[-1]["nmse"], rel=0.3)
    made = read_sae_record(tmp_path / "a").provenance
    assert (made.site, made.target_site) == (SITE, "mlp@1")


def test_a_transcoder_between_sites_of_different_widths_is_refused(two_sites, tmp_path):
    with pytest.raises(ConfigError, match=r"from width 16 to width 8 .*residual@0 to narrow"):
        train(two_sites, SITE, [transcoder("narrow")], tmp_path, config=config())


def test_training_on_some_tokens_only(planted, tmp_path):
    some = TokenFilter(images=tuple(range(0, 100, 3)), patch_columns=(2, 9))
    (sae,) = train(planted.store, SITE, runs()[:1], tmp_path, config=config(where=some))
    tokens = planted.activations[::3, 2:9].flatten(0, 1).double()
    torch.testing.assert_close(sae.mean.double(), tokens.mean(0), rtol=1e-6, atol=1e-6)
    recipe = read_sae_record(tmp_path / "relu").provenance.recipe
    assert recipe["loop"]["where"]["patch_columns"] == [2, 9]
    with pytest.raises(CheckpointError, match=r"loop\.where\.images"):
        train(planted.store, SITE, runs()[:1], tmp_path, config=config())


@pytest.mark.parametrize("changes", [{"batch_size": 50}, {"tokens": "all"}])
def test_a_stream_of_other_batches_is_refused(planted, tmp_path, changes):
    stream = ShuffledTokens(
        planted.store, SITE, **{"batch_size": 100, "tokens": "patches"} | changes
    )
    with pytest.raises(ConfigError, match=r"The stream has batches of .* ask for 100 patches"):
        train_on(stream, runs()[:1], tmp_path, config=config())


def test_a_site_that_the_stream_lacks_is_refused(planted, tmp_path):
    stream = ShuffledTokens(planted.store, SITE, tokens="patches", batch_size=100)
    run = dataclasses.replace(runs()[0], site="mlp@3")
    with pytest.raises(ConfigError, match=r"The stream has no site mlp@3.*residual@0"):
        train_on(stream, [run], tmp_path, config=config())


def test_a_store_too_small_is_refused(planted, tmp_path):
    with pytest.raises(StoreError, match="A batch of 2001 tokens is more than the 2000"):
        train(planted.store, SITE, runs()[:1], tmp_path, config=config(batch_size=2001))


def test_an_unknown_site_is_refused(planted, tmp_path):
    with pytest.raises(StoreError, match=r"no site residual@9.*residual@0"):
        train(planted.store, "residual@9", runs()[:1], tmp_path, config=config())


# Data that cannot be learned from


def spoil(store):
    """Write NaN over the end of the store's last shard, as a bad disk or an old recording would."""
    path = store.folder / SITE / f"{store.n_shards - 1:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)


def test_a_number_that_is_none_stops_and_the_last_point_stays(make_planted, tmp_path):
    planted = make_planted(seed=3)
    spoil(planted.store)
    with pytest.raises(StoreError, match=r"The loss of \w+ is nan.*visae doctor"):
        train(planted.store, SITE, runs()[:3], tmp_path, config=config())
    step = len(read_metrics(tmp_path / "relu"))
    assert 0 < step < 20  # one pass holds it
    points = sorted(p.name for p in (tmp_path / "relu" / "resume").glob("*.json"))
    assert points[-1] == f"{step:08d}.json"
    for rows in map(read_metrics, tmp_path.iterdir()):
        assert all(row["loss"] == row["loss"] for row in rows)


def test_once_the_data_is_mended_training_goes_on_bit_for_bit(make_planted, tmp_path):
    planted = make_planted(seed=3)
    train(planted.store, SITE, runs()[:3], tmp_path / "whole", config=config())
    path = planted.store.folder / SITE / f"{planted.store.n_shards - 1:05d}.safetensors"
    good = path.read_bytes()
    spoil(planted.store)
    with pytest.raises(StoreError, match="holds NaN or infinite activations"):
        train(planted.store, SITE, runs()[:3], tmp_path / "mended", config=config())
    path.write_bytes(good)
    told = []
    train(
        planted.store, SITE, runs()[:3], tmp_path / "mended", config=config(), progress=told.append
    )
    assert told[0].done > 100
    assert results(tmp_path / "mended") == results(tmp_path / "whole")


def test_a_number_that_is_none_in_the_first_tokens_stops_at_once(make_planted, tmp_path):
    planted = make_planted(seed=3, n_images=5)
    spoil(planted.store)
    with pytest.raises(StoreError, match="NaN or infinite"):
        train(planted.store, SITE, runs()[:3], tmp_path, config=config())
    assert not list(tmp_path.glob("*/sae.json"))


# What it is for


@pytest.mark.parametrize("k", [2, 8])
def test_l0_at_inference_is_k_after_a_hundred_steps_and_after_loading(make_planted, tmp_path, k):
    """saev's threshold started from 0; overcomplete lost it by saving."""
    planted = make_planted(n_images=200, d_model=24, n_directions=96)
    run = RunConfig(name="a", n_features=128, sparsity=BatchTopK(k=k))
    (sae,) = train(planted.store, SITE, [run], tmp_path, config=config(100, batch_size=400))
    tokens = planted.activations.flatten(0, 1)
    for again in (sae, load_sae(tmp_path / "a")):
        l0 = again.encode_sparse(tokens).values.numel() / len(tokens)
        assert l0 == pytest.approx(k, rel=0.05)


def test_a_planted_dictionary_is_found(make_planted, tmp_path):
    planted = make_planted(n_directions=40, d_model=32, n_active=2, n_images=200)
    run = RunConfig(
        name="a", n_features=64, sparsity=TopK(k=2), matryoshka=False, learning_rate=0.01
    )
    quick = config(400, batch_size=250, log_steps=100, checkpoint_seconds=60, n_dead_tokens=None)
    (sae,) = train(planted.store, SITE, [run], tmp_path, config=quick)
    best = (planted.directions @ sae.W_dec.T).max(dim=1).values
    assert float(best.mean()) > 0.95
    tokens = planted.activations.flatten(0, 1)
    nmse = (sae(tokens) - tokens).square().sum() / (tokens - tokens.mean(0)).square().sum()
    assert float(nmse) < 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtLeast:
    """A user's own kind: keeps what reaches a floor."""

    kind: Literal["at-least"] = "at-least"
    floor: float = 0.5
    uses_threshold = False
    compares_features = False

    def select(self, pre):
        return SparseCodes.from_dense(torch.where(pre >= self.floor, pre, 0))

    def penalty(self, values, norms, n_tokens):
        return values.new_zeros(())


def test_a_users_own_kind_is_trained(planted, tmp_path):
    run = RunConfig(name="own", n_features=32, sparsity=AtLeast(floor=0.7))
    (sae,) = train(planted.store, SITE, [run], Path(tmp_path), config=config(20))
    assert sae.config.sparsity == AtLeast(floor=0.7)
    rows = read_metrics(tmp_path / "own")
    assert rows[-1]["nmse"] < rows[1]["nmse"]
