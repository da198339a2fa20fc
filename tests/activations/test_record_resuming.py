import errno
import inspect
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from visae.activations.format import RecordConfig, StoreRecord
from visae.activations.planning import bytes_to_write, plan_store
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ConfigError, ModelError, StoreError
from visae.models.config import ModelConfig
from visae.storage.atomic import atomic_path
from visae.storage.locks import exclusive
from visae.storage.records import read_record
from visae.storage.tensors import write_tensors

MODEL_CONFIG = ModelConfig(model="test/table")
SPECIAL = ("cls", "register0")

# Interruption


@pytest.mark.parametrize("n_images", [0, 16, 30, 47, 49])
def test_an_interrupted_recording_resumes_to_equal_files(
    run, tmp_path, n_images, files, stop_after
):
    run(tmp_path / "whole", dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dtype="bfloat16", options=stop_after(n_images))
    with pytest.raises(StoreError, match="incomplete"):
        ActivationStore(tmp_path / "cut")
    told = []
    store = run(tmp_path / "cut", dtype="bfloat16", options={"progress": told.append})
    assert told[0].done > n_images // 16 * 16
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    whole = ActivationStore(tmp_path / "whole")
    for site in store.sites:
        ours, theirs = store.statistics(site), whole.statistics(site)
        assert torch.equal(ours.mean, theirs.mean)
        assert ours.scale == theirs.scale


def test_an_interruption_before_the_last_word_is_completed(run, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("visae.activations.completing.write_skipped", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s")
    with pytest.raises(StoreError, match="incomplete: its recording was interrupted"):
        ActivationStore(tmp_path / "s")
    assert run(tmp_path / "s").n_images == 50


KILLED = """
import sys, time
from pathlib import Path
import torch
from visae.activations.format import RecordConfig, StoreRecord
from visae.activations.planning import bytes_to_write, plan_store
from visae.activations.record import record
from visae.models.config import ModelConfig

{classes}

class Slow(TableModel):
    n_calls = 0
    def trace(self, pixels, sites):
        self.n_calls += 1
        if self.n_calls > 7:  # in the third shard, after a blank image
            print("now", flush=True)
            time.sleep(60)
        return super().trace(pixels, sites)

record(
    NumberedImages(50),
    Slow(torch.load(sys.argv[2]), special=("cls", "register0"), grid=(2, 3)),
    Path(sys.argv[1]),
    config=RecordConfig(
        sites=("residual@3", "mlp@1"), tokens="all", dtype="float32", batch_size=7, shard_bytes=1
    ),
    model_config=ModelConfig(model="test/table"),
)
"""


def test_a_killed_recording_resumes_to_equal_files(
    run, tmp_path, numbered_images, table_model, tables, files
):
    out = tmp_path / "killed"
    torch.save(tables(50), tmp_path / "tables.pt")
    classes = "\n\n".join(map(inspect.getsource, (numbered_images, table_model)))
    code = KILLED.format(classes=classes)
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "tables.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        with pytest.raises(StoreError, match="Another process is writing"):
            run(out)
        os.kill(process.pid, signal.SIGKILL)
    leftover = out / "mlp@1" / ".00002.safetensors.0123abcd.tmp"
    leftover.write_bytes(b"half a shard")
    with pytest.raises(StoreError, match=r"[23] of 4 shards are missing"):
        ActivationStore(out)
    run(out)
    run(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_one_process_writes_at_a_time(run, tmp_path):
    with exclusive(tmp_path / "s"), pytest.raises(StoreError, match="Another process"):
        run(tmp_path / "s")


def test_a_finished_recording_is_left_alone(run, tmp_path, files):
    run(tmp_path / "s")
    before = files(tmp_path / "s")

    def progress(_):
        raise KeyboardInterrupt

    run(tmp_path / "s", options={"progress": progress})
    assert files(tmp_path / "s") == before


@pytest.mark.parametrize("name", ["statistics.safetensors", "images.parquet", "shards.json"])
def test_what_was_gathered_can_be_gathered_again(run, tmp_path, files, name):
    run(tmp_path / "s", dtype="bfloat16")
    before = files(tmp_path / "s")
    (tmp_path / "s" / name).unlink()
    run(tmp_path / "s", dtype="bfloat16")
    assert files(tmp_path / "s") == before


def test_statistics_are_taken_again_with_the_rounding_that_was_recorded(run, tmp_path, files):
    run(tmp_path / "s", dtype="bfloat16")
    before = files(tmp_path / "s")
    for name in ("statistics.safetensors", "mlp@1/00001.safetensors", "shards/00001.json"):
        (tmp_path / "s" / name).unlink()
    run(tmp_path / "s", dtype="bfloat16")
    assert files(tmp_path / "s") == before


def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch, files):
    def write_or_fail(folder, name, tensors):
        if name == "mlp@1/00002.safetensors":
            with atomic_path(folder / name) as temporary:
                temporary.write_bytes(b"half a shard")
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_tensors(folder, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("visae.activations.shard_buffer.write_tensors", write_or_fail)
        with pytest.raises(StoreError, match=r"no space left.*Free space.*resumes"):
            run(tmp_path / "s")
    assert not list((tmp_path / "s" / "mlp@1").glob(".*"))
    with pytest.raises(StoreError, match=r"2 of 4 shards are missing \(2, 3\)"):
        ActivationStore(tmp_path / "s")
    run(tmp_path / "s")
    run(tmp_path / "whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_shards_of_two_recordings_do_not_mix(run, tmp_path, table_model, tables, stop_after):
    """Not even where they have the same shape: the hash of what is recorded tells them apart."""
    model = table_model(tables(50, seed=1), special=SPECIAL, grid=(2, 3), weights="1" * 64)
    run(tmp_path / "other", model=model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", options=stop_after(20))
    for name in ("mlp@1/00002.safetensors", "residual@3/00002.safetensors", "shards/00002.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "s" / name)
    with pytest.raises(StoreError, match="belongs to another recording") as caught:
        run(tmp_path / "s")
    assert caught.value.where.endswith("00002.json")


def test_a_damaged_shard_can_be_recorded_again(run, tmp_path, files):
    run(tmp_path / "s")
    before = files(tmp_path / "s")
    (tmp_path / "s" / "mlp@1" / "00001.safetensors").write_bytes(b"")
    (tmp_path / "s" / "shards" / "00001.json").unlink()
    run(tmp_path / "s")
    assert files(tmp_path / "s") == before


# Another recording in the folder, and the disk


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' now"),
        ({"tokens": "patches"}, "tokens: 'all' there, 'patches' now"),
        ({"sites": ("mlp@1", "residual@3")}, r"sites\[0\]\.name: 'residual@3' there, 'mlp@1' now"),
        ({"sites": ("mlp@1",)}, "sites: "),
        ({"shard_bytes": 10**6}, "images_per_shard: 16 there"),
    ],
)
def test_another_recording_in_the_folder_is_refused(run, tmp_path, change, named):
    run(tmp_path / "s")
    with pytest.raises(StoreError, match=f"another recording .*{named}.*another --out"):
        run(tmp_path / "s", **change)


def test_a_model_whose_weights_changed_is_refused(run, tmp_path, table_model, tables, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", options=stop_after(20))
    model = table_model(tables(50), special=SPECIAL, grid=(2, 3), weights="1" * 64)
    with pytest.raises(StoreError, match=r"identity\.weights_sha256: '000.*there, '111.*now"):
        run(tmp_path / "s", model=model)


def test_other_images_are_refused(run, tmp_path, numbered_images):
    run(tmp_path / "s")
    with pytest.raises(StoreError, match="n_images_in_source: 50 there, 49 now"):
        run(tmp_path / "s", source=numbered_images(49))


def test_another_title_is_no_other_recording(run, tmp_path, table_model, tables, stop_after):
    class Titled(table_model):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.identity = type(self.identity)(
                name=self.identity.name, title="Other", weights_sha256=self.identity.weights_sha256
            )

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", options=stop_after(20))
    model = Titled(tables(50), special=SPECIAL, grid=(2, 3))
    assert run(tmp_path / "s", model=model).n_images == 50


def test_a_folder_of_another_kind_is_refused(run, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "store.json").write_text('{"kind": "sae", "format": 1}')
    with pytest.raises(StoreError, match="This is sae, not activation store"):
        run(tmp_path / "s")


def bytes_there(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_written_fits_what_was_estimated(tmp_path, numbered_images, table_model):
    made = {"residual@3": torch.randn(300, 12, 64), "mlp@1": torch.randn(300, 12, 32)}
    model = table_model(made, special=SPECIAL, grid=(2, 5))
    config = RecordConfig(sites=tuple(made), tokens="all", dtype="float32", shard_bytes=2**18)
    options = {"config": config, "model_config": MODEL_CONFIG}
    plan = plan_store(numbered_images(300), model, tmp_path / "s", **options)
    estimate, most = bytes_to_write(plan, list(range(plan.n_shards))), []

    def progress(_):
        most.append(bytes_there(tmp_path / "s"))

    record(numbered_images(300), model, tmp_path / "s", **options, progress=progress)
    most.append(bytes_there(tmp_path / "s"))
    assert plan.n_shards == 3
    assert max(most) < estimate < 1.6 * max(most)


def test_a_disk_too_small_is_refused_before_anything_is_computed(
    run, tmp_path, monkeypatch, stop_after
):
    usage = shutil.disk_usage(tmp_path)
    n_bytes = 50 * 8 * (5 + 3) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes))
    with pytest.raises(
        StoreError, match=r"needs [\d.]+ kB more and the disk has [\d.]+ kB free.*Free space"
    ):
        run(tmp_path / "s", options=stop_after(0))
    assert {path.name for path in (tmp_path / "s").rglob("*")} == {".lock", "store.json"}


def test_only_what_is_missing_must_fit_the_disk(run, tmp_path, monkeypatch, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", options=stop_after(40))
    plan = read_record(StoreRecord, tmp_path / "s" / "store.json")
    needed = [bytes_to_write(plan, shards) for shards in ([2, 3], [0, 1, 2, 3])]
    assert needed[0] < needed[1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed[0]))
    run(tmp_path / "s")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sites": ()}, "sites: none"),
        ({"sites": ("mlp@1", "mlp@1")}, "each named once"),
        ({"batch_size": 0}, "must be positive"),
        ({"shard_bytes": 0}, "must be positive"),
        ({"sites": ("mlp@1", "shards")}, "a folder shards of its own"),
        ({"sites": ("labels",)}, "a folder labels of its own"),
    ],
)
def test_an_impossible_configuration_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        RecordConfig(**config)


def test_special_tokens_of_a_model_without_any_are_refused(run, tmp_path, table_model, tables):
    model = table_model(tables(50), grid=(2, 4))
    with pytest.raises(ModelError, match="no special tokens"):
        run(tmp_path / "s", model=model, tokens="special")


# Statistics that are added up on the way


@pytest.fixture
def few_wait(monkeypatch):
    """Statistics are added up as soon as those of two shards wait."""
    monkeypatch.setattr("visae.activations.summing.MOST_WAITING", 2)


@pytest.mark.parametrize("n_images", [0, 16, 40, 60, 79, 99])
def test_sums_taken_on_the_way_are_those_taken_at_the_end(
    run, tmp_path, files, stop_after, tables, request, n_images
):
    options = {"given": tables(100), "dtype": "bfloat16"}
    run(tmp_path / "whole", **options)
    request.getfixturevalue("few_wait")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", **options, options=stop_after(n_images))
    waiting = list((tmp_path / "s" / "shards").glob("*.safetensors"))
    assert len(waiting) < 2
    run(tmp_path / "s", **options)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


@pytest.mark.usefixtures("few_wait")
def test_a_shard_lost_after_its_statistics_were_added_is_recorded_again(
    run, tmp_path, files, stop_after, tables
):
    options = {"given": tables(100), "dtype": "bfloat16"}
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", **options, options=stop_after(80))
    assert (tmp_path / "s" / "statistics.partial.safetensors").is_file()
    (tmp_path / "s" / "shards" / "00001.json").unlink()
    run(tmp_path / "s", **options)
    assert files(tmp_path / "s") == files(tmp_path / "whole")
