import csv
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.errors import ConfigError, ImageError, ModelError, StoreError
from visae.images.opening import open_images
from visae.models.config import ModelConfig
from visae.storage.locks import exclusive

SPECIAL = ("cls", "register0")
MODEL_CONFIG = ModelConfig(model="test/table")


def tables(n_images, *, grid=(2, 3), seed=0):
    """Random activations of two sites with two special tokens, 5 and 3 wide."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = len(SPECIAL) + grid[0] * grid[1]
    return {
        "residual@3": torch.randn(n_images, n_tokens, 5, generator=generator),
        "mlp@1": torch.randn(n_images, n_tokens, 3, generator=generator),
    }


@pytest.fixture
def run(numbered_images, table_model):
    """Record 50 images (or those of given tables) in shards of 16."""

    def run_record(
        out, *, given=None, model=None, source=None, strict=False, progress=None, **config
    ):
        made = tables(50) if given is None else given
        n_images = len(next(iter(made.values())))
        defaults = {"sites": tuple(made), "tokens": "all", "dtype": "float32", "batch_size": 7}
        options = {} if progress is None else {"progress": progress}
        return record(
            source or numbered_images(n_images),
            model or table_model(made, special=SPECIAL, grid=(2, 3)),
            out,
            config=RecordConfig(**{**defaults, "shard_bytes": 1, **config}),
            model_config=MODEL_CONFIG,
            strict=strict,
            **options,
        )

    return run_record


def everything(store, site):
    return torch.cat([shard.activations for shard in store.shards(site)])


def files(folder):
    """The bytes of every file but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# What is stored


@pytest.mark.parametrize("tokens", ["all", "patches", "special"])
def test_every_token_is_stored_where_it_belongs(run, tmp_path, tokens):
    made = tables(50)
    store = run(tmp_path / "store", given=made, tokens=tokens)
    kept = {"all": slice(None), "patches": slice(2, None), "special": slice(2)}[tokens]
    assert (store.n_shards, store.n_images) == (4, 50)
    for site, table in made.items():
        assert torch.equal(everything(store, site), table[:, kept])
        assert store.n_tokens(site) == 50 * table[:, kept].shape[1]
        assert store.site(site).layout.grid == (2, 3)
        assert store.site(site).d_model == table.shape[2]


@given(
    n_images=st.integers(1, 70),
    batch_size=st.integers(1, 40),
    unreadable=st.sets(st.integers(0, 69)),
    sites=st.permutations(["residual@3", "mlp@1"]),
    tokens=st.sampled_from(["all", "patches", "special"]),
)
@settings(max_examples=25)
def test_rows_are_images_whatever_the_batches_shards_and_gaps(
    numbered_images, table_model, n_images, batch_size, unreadable, sites, tokens
):
    readable = [i for i in range(n_images) if i not in unreadable]
    made = tables(n_images)
    kept = {"all": slice(None), "patches": slice(2, None), "special": slice(2)}[tokens]
    config = RecordConfig(
        sites=tuple(sites), tokens=tokens, dtype="float32", batch_size=batch_size, shard_bytes=1
    )
    model = table_model(made, special=SPECIAL, grid=(2, 3))
    source = numbered_images(n_images, unreadable=unreadable)
    with tempfile.TemporaryDirectory() as folder:
        if not readable:
            with pytest.raises(ImageError, match="can be read"):
                record(source, model, Path(folder), config=config, model_config=MODEL_CONFIG)
            return
        store = record(source, model, Path(folder), config=config, model_config=MODEL_CONFIG)
        assert store.sites == list(sites)
        assert store.images.refs == tuple(map(str, readable))
        assert store.images.content_ids == tuple(f"{i:064x}" for i in readable)
        for site in sites:
            assert torch.equal(everything(store, site), made[site][readable][:, kept])
        store.verify()


@pytest.mark.parametrize(
    ("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 0.0)]
)
def test_what_is_stored_is_what_the_model_gives(tmp_path, planted_folder, tiny_vit, dtype, bound):
    source = open_images(planted_folder)
    sites = ("residual@1", "attention@0", "blocks.2.mlp.fc1")
    store = record(
        source,
        tiny_vit,
        tmp_path / "store",
        config=RecordConfig(sites=sites, tokens="all", dtype=dtype, batch_size=20),
        model_config=ModelConfig(model="timm/tiny"),
    )
    views = [tiny_vit.preprocessing.view(source.load(e.ref).pixels) for e in source.entries]
    trace = tiny_vit.trace(tiny_vit.preprocessing.pixels(views), sites)
    subnormal = 2**-25 if dtype == "float16" else 0.0
    for site in sites:
        (shard,) = store.shards(site)
        assert shard.activations.dtype == getattr(torch, dtype)
        error = shard.activations.float() - trace.tokens[site]
        assert (error.abs() <= bound * trace.tokens[site].abs() + subnormal).all()
        spread = trace.tokens[site].double()
        spread = (spread - spread.mean((0, 1))).square().sum()
        expected = (error.double().square().sum() / spread).sqrt()
        assert store.statistics(site).rounding_error == pytest.approx(float(expected), rel=0.02)


def test_labels_and_groups_stand_beside_their_images(tmp_path, store_of):
    labels = [None if i % 5 == 0 else f"class{i % 3}" for i in range(20)]
    groups = [f"site{i % 2}" for i in range(20)]
    store = store_of(tmp_path / "s", tables(20), special=SPECIAL, labels=labels, groups=groups)
    assert store.images.labels == tuple(labels)
    assert store.images.groups == tuple(groups)


def test_the_record_says_what_was_recorded(run, tmp_path):
    written = run(tmp_path / "store").record
    assert written.complete
    assert (written.model, written.identity.name) == ("test/table", "test/table")
    assert (written.tokens, written.dtype, written.images_per_shard) == ("all", "float32", 16)
    assert written.n_images_in_source == 50


def test_shards_have_about_the_size_asked_for(run, tmp_path):
    made = {"residual@3": torch.zeros(100, 8, 32) + torch.arange(100)[:, None, None]}
    store = run(tmp_path / "store", given=made, shard_bytes=40 * 8 * 32 * 4)
    assert [store.n_images_in_shard(i) for i in range(store.n_shards)] == [40, 40, 20]


def test_images_are_read_only_a_little_ahead_of_the_model(
    run, tmp_path, numbered_images, table_model
):
    loads, most_ahead = [], []

    class Counting(numbered_images):
        def load(self, ref):
            loads.append(ref)
            return super().load(ref)

    class Watching(table_model):
        n_seen = 0

        def trace(self, pixels, sites):
            self.n_seen += len(pixels)
            most_ahead.append(len(loads) - self.n_seen)
            return super().trace(pixels, sites)

    made = tables(200)
    model = Watching(made, special=SPECIAL, grid=(2, 3))
    run(
        tmp_path / "s",
        given=made,
        model=model,
        source=Counting(200),
        batch_size=4,
        shard_bytes=10**9,
    )
    assert sorted(map(int, loads)) == list(range(200))
    assert max(most_ahead) <= 2 * 4 + 1


def test_progress_counts_images_to_the_end(run, tmp_path, numbered_images):
    told = []
    run(tmp_path / "s", source=numbered_images(50, unreadable={3, 49}), progress=told.append)
    assert [p.done for p in told] == sorted({p.done for p in told})
    assert (told[-1].done, told[-1].total, told[-1].unit) == (50, 50, "images")


# Images that cannot be read


def test_unreadable_images_are_left_out_and_listed(run, tmp_path, numbered_images):
    store = run(tmp_path / "s", source=numbered_images(50, unreadable={40, 2, 17}))
    with (tmp_path / "s" / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["ref", "reason"], *([str(i), f"Image {i} is broken"] for i in (2, 17, 40))]
    assert store.n_images == 47


def test_a_complete_store_lists_that_nothing_was_skipped(run, tmp_path):
    run(tmp_path / "s")
    assert (tmp_path / "s" / "skipped.csv").read_text() == "ref,reason\n"


def test_broken_files_of_a_folder_are_skipped(tmp_path, planted_folder, tiny_vit):
    folder = tmp_path / "images"
    shutil.copytree(planted_folder, folder)
    (folder / "red" / "broken.png").write_bytes(b"no image")
    cut = (folder / "red" / "01.png").read_bytes()
    (folder / "blue" / "cut.png").write_bytes(cut[: len(cut) // 2])
    Image.new("RGB", (200_000, 1)).save(folder / "blue" / "long.png")
    store = record(
        open_images(folder),
        tiny_vit,
        tmp_path / "s",
        config=RecordConfig(sites=("residual@0",)),
        model_config=ModelConfig(model="timm/tiny"),
    )
    assert store.n_images == 20
    with (tmp_path / "s" / "skipped.csv").open(newline="") as file:
        skipped = {row["ref"]: row["reason"] for row in csv.DictReader(file)}
    assert list(skipped) == ["blue/cut.png", "blue/long.png", "red/broken.png"]
    assert "truncated" in skipped["blue/cut.png"]
    assert "elongated" in skipped["blue/long.png"]


def test_strict_stops_at_the_first_broken_image(run, tmp_path, numbered_images):
    source = numbered_images(50, unreadable={20, 30})
    with pytest.raises(ImageError, match="Image 20 is broken"):
        run(tmp_path / "s", source=source, strict=True)


def test_nothing_readable_is_an_error_and_leaves_the_way_free(run, tmp_path, numbered_images):
    source = numbered_images(50, unreadable=range(50))
    with pytest.raises(ImageError, match=r"None of the 50 images can be read.*Image 0 is broken"):
        run(tmp_path / "s", source=source)
    assert (tmp_path / "s" / "skipped.csv").read_text().count("\n") == 51
    assert run(tmp_path / "s", source=numbered_images(50)).n_images == 50


def test_no_images_are_refused(run, tmp_path, numbered_images):
    with pytest.raises(ImageError, match="There are no images"):
        run(tmp_path / "s", source=numbered_images(0))
    assert not (tmp_path / "s").exists()


# Activations that cannot be stored


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_no_numbers_name_image_and_site(run, tmp_path, value):
    made = tables(50)
    made["mlp@1"][33, 4, 1] = value
    with pytest.raises(ModelError, match=r"NaN or infinite activations at mlp@1 for image 33"):
        run(tmp_path / "s", given=made)


def test_an_overflow_of_half_precision_is_named(run, tmp_path):
    made = tables(50)
    made["residual@3"][20, 0, 0] = 70_000.0
    with pytest.raises(ModelError, match=r"residual@3 for image 20.*--dtype bfloat16"):
        run(tmp_path / "s", given=made, dtype="float16")
    assert run(tmp_path / "t", given=made, dtype="bfloat16").n_images == 50


# Interruption


def stop_after(n_images):
    def progress(told):
        if told.done > n_images:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("n_images", [0, 16, 30, 47, 49])
def test_an_interrupted_recording_resumes_to_equal_files(run, tmp_path, n_images):
    run(tmp_path / "whole", dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", dtype="bfloat16", progress=stop_after(n_images))
    with pytest.raises(StoreError, match="incomplete"):
        ActivationStore(tmp_path / "cut")
    told = []
    store = run(tmp_path / "cut", dtype="bfloat16", progress=told.append)
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
        patch.setattr("visae.activations.record.write_skipped", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s")
    with pytest.raises(StoreError, match="incomplete: its recording was interrupted"):
        ActivationStore(tmp_path / "s")
    assert run(tmp_path / "s").n_images == 50


KILLED = """
import sys, time
from pathlib import Path
import torch
from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.models.config import ModelConfig

{classes}

class Slow(TableModel):
    n_calls = 0
    def trace(self, pixels, sites):
        self.n_calls += 1
        if self.n_calls > 6:  # in the third shard
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


def test_a_killed_recording_resumes_to_equal_files(run, tmp_path, numbered_images, table_model):
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
    with pytest.raises(StoreError, match=r"2 of 4 shards are missing \(2, 3\)"):
        ActivationStore(out)
    run(out)
    run(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_one_process_writes_at_a_time(run, tmp_path):
    with exclusive(tmp_path / "s"), pytest.raises(StoreError, match="Another process"):
        run(tmp_path / "s")


def test_a_finished_recording_is_left_alone(run, tmp_path):
    run(tmp_path / "s")
    before = files(tmp_path / "s")

    def progress(_):
        raise KeyboardInterrupt

    run(tmp_path / "s", progress=progress)
    assert files(tmp_path / "s") == before


def test_a_damaged_shard_can_be_recorded_again(run, tmp_path):
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


def test_a_model_whose_weights_changed_is_refused(run, tmp_path, table_model):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", progress=stop_after(20))
    model = table_model(tables(50), special=SPECIAL, grid=(2, 3), weights="1" * 64)
    with pytest.raises(StoreError, match=r"identity\.weights_sha256: '000.*there, '111.*now"):
        run(tmp_path / "s", model=model)


def test_other_images_are_refused(run, tmp_path, numbered_images):
    run(tmp_path / "s")
    with pytest.raises(StoreError, match="n_images_in_source: 50 there, 49 now"):
        run(tmp_path / "s", source=numbered_images(49))


def test_another_title_is_no_other_recording(run, tmp_path, table_model):
    class Titled(table_model):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.identity = type(self.identity)(
                name=self.identity.name, title="Other", weights_sha256=self.identity.weights_sha256
            )

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", progress=stop_after(20))
    model = Titled(tables(50), special=SPECIAL, grid=(2, 3))
    assert run(tmp_path / "s", model=model).n_images == 50


def test_a_folder_of_another_kind_is_refused(run, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "store.json").write_text('{"kind": "sae", "format": 1}')
    with pytest.raises(StoreError, match="This is sae, not activation store"):
        run(tmp_path / "s")


def test_a_disk_too_small_is_refused_before_anything_is_computed(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    n_bytes = 50 * 8 * (5 + 3) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes - 1))
    with pytest.raises(StoreError, match=r"needs 0\.0 GB more.*Free space"):
        run(tmp_path / "s", progress=stop_after(0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes))
    run(tmp_path / "s")


def test_only_what_is_missing_must_fit_the_disk(run, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", progress=stop_after(40))
    usage = shutil.disk_usage(tmp_path)
    left = 18 * 8 * (5 + 3) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=left))
    run(tmp_path / "s")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"sites": ()}, "sites: none"),
        ({"sites": ("mlp@1", "mlp@1")}, "each named once"),
        ({"batch_size": 0}, "must be positive"),
        ({"shard_bytes": 0}, "must be positive"),
    ],
)
def test_an_impossible_configuration_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        RecordConfig(**config)


def test_special_tokens_of_a_model_without_any_are_refused(run, tmp_path, table_model):
    model = table_model(tables(50), grid=(2, 4))
    with pytest.raises(ModelError, match="no special tokens"):
        run(tmp_path / "s", model=model, tokens="special")
