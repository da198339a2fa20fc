import re
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.shard_buffer import ShardBuffer
from visae.errors import ImageError, StoreError
from visae.images.opening import open_images
from visae.models.config import ModelConfig

MODEL_CONFIG = ModelConfig(model="test/table")
SPECIAL = ("cls", "register0")


@pytest.mark.parametrize("tokens", ["all", "patches", "special"])
def test_every_token_is_stored_where_it_belongs(run, tmp_path, tokens, tables, everything):
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
@settings(max_examples=12)
def test_rows_are_images_whatever_the_batches_shards_and_gaps(
    numbered_images,
    table_model,
    n_images,
    batch_size,
    unreadable,
    sites,
    tokens,
    tables,
    everything,
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


def test_labels_and_groups_stand_beside_their_images(tmp_path, store_of, tables):
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
    run, tmp_path, numbered_images, table_model, tables
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


def test_no_more_than_two_shards_are_in_memory(run, tmp_path, tables, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def make(*args, **options):
        shard = ShardBuffer(*args, **options)
        alive.add(shard)
        most.append(len(alive))
        return shard

    monkeypatch.setattr("visae.activations.record.ShardBuffer", make)
    run(tmp_path / "s", given=tables(200))
    assert len(most) == 13
    assert max(most) <= 2


def test_progress_counts_images_to_the_end(run, tmp_path, numbered_images):
    told = []
    run(
        tmp_path / "s",
        source=numbered_images(50, unreadable={3, 49}),
        options={"progress": told.append},
    )
    assert [p.done for p in told] == sorted({p.done for p in told})
    assert (told[-1].done, told[-1].total, told[-1].unit) == (50, 50, "images")
    assert re.fullmatch(r"[\d.]+ [kM]B of [\d.]+ [kM]B written", told[-1].note)


def test_mixed_precision_is_another_recording_of_nearly_the_same(
    tmp_path, planted_folder, tiny_vit
):
    def recorded(precision, out):
        return record(
            open_images(planted_folder),
            tiny_vit,
            tmp_path / out,
            config=RecordConfig(sites=("residual@1",), dtype="float32", precision=precision),
            model_config=ModelConfig(model="timm/tiny"),
        )

    exact, mixed = (recorded(p, p).shard("residual@1", 0) for p in ("float32", "bfloat16"))
    error = (mixed.activations - exact.activations).norm() / exact.activations.norm()
    assert 1e-4 < error < 2e-2
    with pytest.raises(StoreError, match="precision: 'float32' there, 'bfloat16' now"):
        recorded("bfloat16", "float32")
