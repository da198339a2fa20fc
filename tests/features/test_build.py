"""Building an index: what is in it, resuming, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import visae.features.build as module
from visae.activations.store import ActivationStore
from visae.errors import CheckpointError, FeatureIndexError, StoreError
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.features.index import FeatureIndex
from visae.features.thumbnails import thumbnail_path
from visae.storage.locks import exclusive


def files_of(folder):
    """Every file of an index but its lock, by its path, as bytes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_codes_are_those_of_the_sae(small_index, dense):
    found = torch.cat([codes.dense() for codes in small_index.shards()])
    assert torch.equal(found, dense.flatten(0, 1))
    assert [shard.n_images for shard in small_index.record.codes] == [16, 16, 6]


def test_the_statistics_are_those_of_the_dense_activations(small_index, dense):
    for feature in range(5):
        row = small_index.row(feature)
        values = dense[..., feature].double()
        positive = values[values > 0].numpy()
        assert row.feature == feature
        assert row.n_tokens_active == row.n_values == sum(row.histogram) == len(positive)
        assert row.density == pytest.approx(len(positive) / (38 * 7))
        assert row.n_images_active == int((values.amax(1) > 0).sum())
        assert row.mean_active == pytest.approx(positive.mean())
        assert row.max == positive.max()
        np.testing.assert_allclose(
            (row.q50, row.q90, row.q99), np.quantile(positive, (0.5, 0.9, 0.99))
        )
        patches = values[:, 1:]
        r2 = patches.mean(0).var(correction=0) / patches.flatten().var(correction=0)
        assert row.position_r2 == pytest.approx(float(r2))
        assert row.special_share == pytest.approx(float((values[:, 0] > 0).sum()) / len(positive))
        assert row.border_lift is None  # 2 × 3 patches all lie at the border
        assert row.flags == ("dense",)
        assert set(row.neighbours) == set(range(6)) - {feature}
    assert small_index.row(5).flags == ("dead",)
    assert small_index.row(5).label_entropy is None


def test_the_label_entropy_leaves_out_images_without_label(small_index, small_store, dense):
    labels = np.array(["" if label is None else label for label in small_store.images.labels])
    weight = [float(dense[labels == name].amax(1)[:, 0].sum()) for name in ("cat", "dog")]
    share = np.array(weight) / sum(weight)
    expected = -(share * np.log2(share)).sum()
    assert small_index.row(0).label_entropy == pytest.approx(expected)


def test_the_examples_are_the_strongest_images(small_index, dense):
    for feature in range(5):
        maxima = dense[..., feature].amax(1)
        top = small_index.examples(feature)["top"]
        expected = maxima.topk(2)
        assert [example.image_row for example in top] == expected.indices.tolist()
        assert [example.max for example in top] == expected.values.tolist()
        for examples in small_index.examples(feature).values():
            for example in examples:
                assert example.max == float(maxima[example.image_row])
                assert example.content_id == small_index.images.content_ids[example.image_row]
    assert not any(small_index.examples(5).values())


def test_every_example_has_a_thumbnail_and_no_other_image(small_index):
    shown = {
        example.content_id
        for feature in range(6)
        for examples in small_index.examples(feature).values()
        for example in examples
    }
    there = {path.stem for path in (small_index.folder / "thumbnails").iterdir()}
    assert there == shown
    assert small_index.thumbnail(min(shown)).size == (1, 1)


def test_an_image_that_occurs_twice_serves_once_as_example(
    tmp_path, table_model, numbered_images, identity_sae, make_tokens
):
    class Repeated(numbered_images):
        def load(self, ref):
            return super().load(str(int(ref) % 3))

    from visae.activations.format import RecordConfig
    from visae.activations.record import record
    from visae.models.config import ModelConfig

    source = Repeated(6)
    store = record(
        source,
        table_model({"residual@0": make_tokens(3)}),
        tmp_path / "store",
        config=RecordConfig(sites=("residual@0",), dtype="float32"),
        model_config=ModelConfig(model="test/table"),
    )
    sae = identity_sae(tmp_path / "sae", store)
    index = build_index(sae, store, tmp_path / "index", config=IndexConfig(), images=source)
    assert index.row(0).n_images_active == 6
    for examples in index.examples(0).values():
        assert {example.image_row for example in examples} <= {0, 1, 2}
    assert len(index.examples(0)["top"]) == 3


def test_the_discovery_side_leaves_the_other_images_untouched(build, small_store, dense, tmp_path):
    index = build(tmp_path / "index", side="discovery", confirmation_share=0.6, salt="a")
    sides = small_store.images.sides(confirmation_share=0.6, salt="a")
    rows = [row for row, side in enumerate(sides) if side == "discovery"]
    assert 0 < len(rows) < 38
    expected = tuple(small_store.images.content_ids[row] for row in rows)
    assert index.images.content_ids == expected
    found = torch.cat([codes.dense() for codes in index.shards()])
    assert torch.equal(found, dense[rows].flatten(0, 1))
    shown = {path.stem for path in (index.folder / "thumbnails").iterdir()}
    assert shown <= set(expected)


def test_no_image_on_the_discovery_side_is_refused(build, tmp_path):
    with pytest.raises(FeatureIndexError, match="None of the 38 images is on the discovery side"):
        build(tmp_path / "index", side="discovery", confirmation_share=0.9999)


def test_an_sae_of_patches_reads_the_patches_of_a_store_of_all_tokens(
    build, small_store, identity_sae, dense, tmp_path
):
    sae = identity_sae(tmp_path / "saes/patches", small_store, tokens="patches")
    index = build(tmp_path / "index", sae=sae)
    found = torch.cat([codes.dense() for codes in index.shards()])
    assert torch.equal(found, dense[:, 1:].flatten(0, 1))
    heat = index.heat_map(0, 20)
    assert torch.equal(heat, dense[20, 1:, 0].view(2, 3))


def test_two_builds_are_equal_byte_for_byte(small_index, build, workspace):
    folder = workspace / "features/again@small"
    build(folder, examples_per_band=2)
    one, other = files_of(small_index.folder), files_of(folder)
    assert one == other
    shutil.rmtree(folder)


def test_a_finished_index_is_left_as_it_is(small_index, build):
    before = {p: p.stat().st_mtime_ns for p in small_index.folder.rglob("*.*") if p.is_file()}
    build(small_index.folder, examples_per_band=2)
    after = {p: p.stat().st_mtime_ns for p in small_index.folder.rglob("*.*") if p.is_file()}
    assert {p for p in before if p.name != ".lock"} == {p for p in after if p.name != ".lock"}
    assert all(after[p] == before[p] for p in before if p.name != ".lock")


@pytest.mark.parametrize(
    "lost", ["codes/00001.safetensors", "features.parquet", "images.parquet", "thumbnails"]
)
def test_what_is_missing_is_made_again(small_index, own_index, build, lost):
    path = own_index / lost
    if path.is_dir():
        path = min(path.iterdir())
    path.unlink()
    build(own_index, examples_per_band=2)
    assert files_of(own_index) == files_of(small_index.folder) | {
        "index.json": (own_index / "index.json").read_bytes()
    }
    FeatureIndex(own_index).verify()


def test_a_truncated_code_file_is_made_again(own_index, build, small_index):
    path = own_index / "codes/00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    build(own_index, examples_per_band=2)
    assert path.read_bytes() == data


KILLED = """
import os, signal, sys
from pathlib import Path

from PIL import Image

import visae.features.build as build
from visae.activations.store import ActivationStore
from visae.features.config import IndexConfig
from visae.images.source import ImageEntry, LoadedImage

class Source:
    location = "numbered:"
    entries = [ImageEntry(ref=str(i)) for i in range(38)]

    def load(self, ref):
        return LoadedImage(f"{int(ref):064x}", Image.new("RGB", (1, 1)))

def write_one_and_die(folder, name, codes):
    if name.endswith("00001.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, name, codes)

write, build.write_codes = build.write_codes, write_one_and_die
root, out = Path(sys.argv[1]), Path(sys.argv[2])
store = ActivationStore(root / "activations/small")
config = IndexConfig(examples_per_band=2)
build.build_index(root / "saes/identity", store, out, config=config, images=Source())
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_killed_build_resumes_to_an_equal_index(workspace, build, small_index, monkeypatch):
    out = workspace / "features/killed@small"
    command = [sys.executable, "-c", KILLED, str(workspace), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (out / "codes").iterdir()] == ["00000.safetensors"]
    with pytest.raises(FeatureIndexError, match=r"incomplete: the codes of 1 of 3 shards.*again"):
        FeatureIndex(out)

    encoded = []
    encode = module._encode_shard

    def count(work, sae, number, first_image):
        encoded.append(number)
        return encode(work, sae, number, first_image)

    monkeypatch.setattr(module, "_encode_shard", count)
    build(out, examples_per_band=2)
    assert encoded == [1, 2]
    assert files_of(out) == files_of(small_index.folder)
    shutil.rmtree(out)


def test_another_recipe_is_refused_naming_what_differs(own_index, build):
    with pytest.raises(FeatureIndexError, match=r"another index \(config.seed: 0 there, 7 now\)"):
        build(own_index, examples_per_band=2, seed=7)


def test_another_sae_is_refused(own_index, build, small_store, identity_sae, tmp_path):
    sae = identity_sae(tmp_path / "saes/identity", small_store, n_features=4)
    with pytest.raises(FeatureIndexError, match=r"sae_sha256: .*n_features: 6 there, 4 now"):
        build(own_index, sae=sae, examples_per_band=2)


def test_codes_without_their_record_are_refused(own_index, build):
    (own_index / "index.json").unlink()
    with pytest.raises(FeatureIndexError, match=r"holds codes, but not the index.json"):
        build(own_index, examples_per_band=2)


def test_an_sae_of_another_site_is_refused(build, workspace, store_of, make_tokens, tmp_path):
    store = store_of(tmp_path / "store", {"mlp@1": make_tokens()}, grid=(1, 7))
    with pytest.raises(CheckpointError, match="not made for this store"):
        build(tmp_path / "index", store=store)


def test_a_folder_that_is_being_written_is_refused(build, tmp_path):
    with (
        exclusive(tmp_path / "index"),
        pytest.raises(StoreError, match="Another process is writing"),
    ):
        build(tmp_path / "index")


def test_images_that_are_not_there_stop_it_before_anything_is_written(
    workspace, small_store, tmp_path
):
    out = tmp_path / "index"
    with pytest.raises(StoreError, match=r"cannot be opened.*--images"):
        build_index(workspace / "saes/identity", small_store, out, config=IndexConfig())
    assert not list(out.glob("codes/*"))
    assert not (out / "index.json").exists()


def test_the_images_may_be_given_by_location(planted_store, planted_folder, identity_sae, tmp_path):
    sae = identity_sae(tmp_path / "sae", planted_store, site="mlp@2", tokens="patches")
    told = []
    index = build_index(
        sae,
        planted_store,
        tmp_path / "index",
        config=IndexConfig(examples_per_band=1),
        images=planted_folder,
        progress=told.append,
    )
    index.verify()
    assert index.classes == ("blue", "red")
    example = index.examples(0)["top"][0]
    view = planted_store.record.preprocessing.view(
        planted_store.source().load(planted_store.images.refs[example.image_row]).pixels
    )
    difference = np.asarray(index.thumbnail(example.content_id), float) - np.asarray(view, float)
    assert np.abs(difference).mean() < 20
    for stage in ("index", "describe", "thumbnails"):
        own = [p for p in told if p.stage == stage]
        assert own[-1].done == own[-1].total
        assert [p.done for p in own] == sorted(p.done for p in own)


def test_the_bound_on_samples_changes_the_quantiles_little(build, monkeypatch, tmp_path, dense):
    monkeypatch.setattr("visae.features.describe._MOST_VALUES", 200)
    monkeypatch.setattr("visae.features.describe._MOST_IMAGE_MAXIMA", 60)
    index = build(tmp_path / "index", examples_per_band=2)
    row = index.row(0)
    assert 0 < row.n_values < row.n_tokens_active
    assert sum(row.histogram) == row.n_tokens_active
    assert row.max == float(dense[..., 0].max())
    top = [example.image_row for example in index.examples(0)["top"]]
    assert top == dense[..., 0].amax(1).topk(2).indices.tolist()
    assert row.q50 == pytest.approx(float(dense[..., 0][dense[..., 0] > 0].median()), rel=0.5)


def test_a_store_that_moved_with_its_workspace_still_matches(workspace, build, tmp_path):
    moved = shutil.copytree(workspace, tmp_path / "moved")
    store = ActivationStore(moved / "activations/small")
    index = build(
        moved / "features/identity@small",
        store=store,
        sae=moved / "saes/identity",
        examples_per_band=2,
    )
    assert index.record.sae == "../../saes/identity"
    assert index.record.store == "../../activations/small"
    assert thumbnail_path(index.folder, index.images.content_ids[0]).parent.is_dir()
