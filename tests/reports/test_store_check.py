"""The doctor looks at stores: damage of every kind, what is missing, the command that mends."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from visae.activations.format import RecordConfig, StoreRecord
from visae.activations.record import record
from visae.activations.resuming import record_command
from visae.activations.store import ActivationStore
from visae.images.opening import open_images
from visae.models.config import ModelConfig
from visae.reports.store_check import check_store
from visae.storage.locks import exclusive
from visae.storage.records import read_record
from visae.storage.tensors import read_tensors, write_tensors

SITES = ("a@0", "b@0")


@pytest.fixture(scope="module")
def healthy(store_of, tmp_path_factory):
    """Two sites, 40 images in three shards; not to be changed."""
    generator = torch.Generator().manual_seed(0)
    tables = {site: torch.randn(40, 5, 4, generator=generator) for site in SITES}
    folder = tmp_path_factory.mktemp("checked") / "store"
    labels = ["one", "two"] * 20
    return store_of(folder, tables, special=("cls",), labels=labels, shard_bytes=1, tokens="all")


@pytest.fixture
def folder(healthy, tmp_path):
    shutil.copytree(healthy.folder, tmp_path / "store")
    return tmp_path / "store"


def said(folder):
    """What is wrong with a store that is not well: its lines, without the command."""
    finding = check_store(folder)
    assert not finding.is_fine
    *wrong, command = finding.detail.split("\n     ")
    assert command.startswith("to mend it, run: ")
    assert "visae record --images numbered: --model test/table" in command
    return wrong


def rewrite(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def replace_activations(folder, site, shard, change):
    """Change a shard's numbers and its recorded checksum, as a faulty recorder would."""
    name = f"{site}/{shard:05d}.safetensors"
    table = ActivationStore(folder).shard(site, shard).activations.clone()
    ref = write_tensors(folder, name, {"activations": change(table)})
    path = folder / "shards" / f"{shard:05d}.json"
    said_of_it = {"sha256": ref.sha256, "n_bytes": ref.n_bytes}
    rewrite(path, lambda record: record["files"][site].update(said_of_it))


def test_a_healthy_store(healthy):
    finding = check_store(healthy.folder)
    assert finding.is_fine
    assert finding.detail.startswith("store of 40 images, every checksum right; a@0 (‖x‖ median")


@pytest.mark.parametrize("site", SITES)
def test_an_altered_activation(folder, site):
    path = folder / site / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (wrong,) = said(folder)
    assert wrong.startswith(f"This file's checksum differs from the recorded one ({path}): delete ")
    assert "shards/00001.json and record again" in wrong


def test_every_damaged_shard_is_named(folder):
    for shard in (0, 2):
        (folder / "b@0" / f"{shard:05d}.safetensors").unlink()
    assert [wrong.startswith("A file is missing") for wrong in said(folder)] == [True, True]


def test_an_altered_label(folder):
    rewrite(folder / "shards" / "00000.json", lambda record: record["labels"].reverse())
    (wrong,) = said(folder)
    assert "checksum" in wrong or "bytes instead of" in wrong
    assert "shards/00000.json and record again" in wrong


@pytest.mark.parametrize("name", ["images.parquet", "statistics.safetensors", "shards.json"])
def test_a_gathered_file_that_is_gone(folder, name):
    (folder / name).unlink()
    (wrong,) = said(folder)
    assert wrong.startswith("A file is missing")
    assert f"{name}): delete it and record again" in wrong


def test_statistics_of_other_activations(folder):
    """Each file is whole, but the statistics are not those of the activations."""
    found = read_tensors(folder / "statistics.safetensors")
    tensors = {name: 1.001 * tensor.double() for name, tensor in found.items()}
    ref = write_tensors(folder, "statistics.safetensors", tensors)
    said_of_it = {"sha256": ref.sha256, "n_bytes": ref.n_bytes}
    rewrite(folder / "store.json", lambda store: store["contents"]["statistics"].update(said_of_it))
    wrong = said(folder)
    assert len(wrong) == 4  # special and patch tokens of both sites
    assert wrong[0].startswith("the stored statistics of a@0/special are not those of its")


def test_activations_that_are_no_numbers(folder):
    def spoil(table):
        table[3, 1, 2] = float("nan")
        return table

    replace_activations(folder, "b@0", 1, spoil)
    wrong = said(folder)
    assert wrong[0].startswith("NaN or infinite activations at b@0, image 19 (")


def test_activations_of_another_shape(folder):
    replace_activations(folder, "a@0", 2, lambda table: table[:, :-1])
    wrong = said(folder)
    assert wrong[0].startswith("A shard holds (8, 4, 4) of torch.float32 instead of (8, 5, 4)")


def test_missing_shards_of_a_store_that_was_complete(folder):
    for shard in (1, 2):
        (folder / "shards" / f"{shard:05d}.json").unlink()
    assert said(folder)[0] == "incomplete: 2 of 3 shards are missing (1-2)"


def test_a_recording_that_was_interrupted(folder):
    rewrite(folder / "store.json", lambda record: record.update(contents=None))
    assert said(folder) == ["incomplete: every shard is written, but they are not gathered yet"]
    (folder / "shards" / "00002.json").unlink()
    (folder / "a@0" / "00001.safetensors").write_bytes(b"")
    wrong = said(folder)
    assert wrong[0] == "incomplete: 1 of 3 shards are missing (2)"
    assert wrong[1].startswith("This file has 0 bytes instead of")


def test_shards_of_another_recording(folder, store_of, tmp_path):
    table = torch.randn(40, 5, 4)
    tables = dict.fromkeys(SITES, table)
    kept = {"special": ("cls",), "tokens": "all", "shard_bytes": 1}
    other = store_of(tmp_path / "other", tables, dtype="float16", **kept)
    shutil.copy(other.folder / "shards" / "00001.json", folder / "shards" / "00001.json")
    wrong = said(folder)
    assert wrong[0].startswith("This shard belongs to another recording (")


def test_files_of_no_shard(folder):
    shutil.copy(folder / "shards" / "00001.json", folder / "shards" / "00007.json")
    (wrong,) = said(folder)
    assert wrong == "shards holds files of no shard of this store: 00007"


def test_what_a_killed_process_left(folder):
    (folder / "a@0" / ".00001.safetensors.0123abcd.tmp").write_bytes(bytes(2_000_000))
    (wrong,) = said(folder)
    assert wrong.startswith("1 temporary file of a killed process (2.0 MB)")


@pytest.fixture
def masked(tmp_path, make_vit):
    """A store of two images with masks of two classes."""
    home = tmp_path / "street"
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (home / part).mkdir(parents=True)
        for i in range(2):
            values = generator.integers(0, 2, (16, 16), dtype=np.uint8)
            Image.fromarray(values).save(home / part / f"{i}.png")
    (home / "classes.txt").write_text("road\ncar\n")
    return record(
        open_images(f"seg:{home}"),
        make_vit(),
        tmp_path / "store",
        config=RecordConfig(sites=("residual@0",)),
        model_config=ModelConfig(model="tiny"),
    ).folder


def change_labels(folder, change):
    """Change a shard's patch labels and their recorded checksum, as a faulty recorder would."""
    tensors = change(read_tensors(folder / "labels" / "00000.safetensors"))
    ref = write_tensors(folder, "labels/00000.safetensors", tensors)
    said_of_it = {"sha256": ref.sha256, "n_bytes": ref.n_bytes}
    rewrite(
        folder / "shards" / "00000.json", lambda shard: shard["patch_labels"].update(said_of_it)
    )


def test_patch_labels(masked):
    finding = check_store(masked)
    assert finding.is_fine
    assert finding.detail.endswith("; 2 patch classes on 100% of the patches")
    change_labels(masked, lambda tensors: {name: t + 5 for name, t in tensors.items()})
    detail = check_store(masked).detail
    assert "hold unknown classes [5, 6]" in detail
    change_labels(masked, lambda tensors: {name: t[:1] for name, t in tensors.items()})
    assert "have shapes [(1, " in check_store(masked).detail
    (masked / "labels" / "00000.safetensors").unlink()
    assert "A file is missing" in check_store(masked).detail


def test_a_store_that_is_being_written(folder):
    (folder / "shards" / "00002.json").unlink()
    with exclusive(folder):
        finding = check_store(folder)
    assert (finding.is_fine, finding.detail) == (True, "being written now: 2 of 3 shards so far")


def test_many_problems_are_shortened(store_of, tmp_path):
    store = store_of(tmp_path / "s", {"a@0": torch.randn(200, 2, 3)}, shard_bytes=1)
    for path in (store.folder / "a@0").iterdir():
        path.write_bytes(b"")
    wrong = said(store.folder)
    assert len(wrong) == 11
    assert wrong[-1] == "and 3 more like these"


def test_the_command_names_everything_that_was_asked_for(folder):
    rewrite(
        folder / "store.json",
        lambda record: record.update(
            weights="../a b.safetensors",
            revision="v1",
            image_size=64,
            precision="bfloat16",
            images_per_shard=16,
        ),
    )
    found = read_record(StoreRecord, folder / "store.json")
    words = shlex.split(record_command(found, folder))
    assert words[:2] == ["visae", "record"]
    options = dict(zip(words[2::2], words[3::2], strict=False))
    assert options["--images"] == "numbered:"
    assert options["--weights"] == str(folder.parent / "a b.safetensors")
    assert (options["--revision"], options["--image-size"]) == ("v1", "64")
