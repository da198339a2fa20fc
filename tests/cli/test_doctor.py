"""The doctor's remedy for a store, run as printed."""

import shlex
import shutil
from pathlib import Path

from visae.activations.store import ActivationStore


def test_the_command_that_the_doctor_prints_mends_the_store(visae, home, tmp_path):
    """With other shards, another title and a path with a space, none of which it may forget."""
    photos, store = tmp_path / "my photos", tmp_path / "activations" / "photos"
    shutil.copytree(home / "photos", photos)
    code, *_ = visae(
        *("record", "--images", photos, "--model", "test_vit", "--image-size", 32),
        *("--weights", home / "weights.safetensors", "--site", "residual@2", "norm"),
        *("--dtype", "float32", "--shard-mb", 1, "--title", "Tiny ViT", "--out", store),
    )
    assert code == 0
    before = ActivationStore(store).digest
    assert visae("doctor", store)[0] == 0
    (store / "norm" / "00000.safetensors").write_bytes(b"cut short")
    (store / "shards" / "00000.json").unlink()
    code, said, error = visae("doctor", store)
    assert code == 2
    assert "1 of 1 checks failed" in error
    command = said.partition("to mend it, run: ")[2].strip()
    assert visae(*shlex.split(command)[1:])[0] == 0
    assert visae("doctor", store)[0] == 0
    mended = ActivationStore(store)
    assert mended.digest == before
    assert mended.record.identity.title == "Tiny ViT"


def test_the_printed_command_deletes_what_is_damaged_first(visae, home, tmp_path):
    """Recording skips shards that seem finished, and files that seem gathered."""
    store = tmp_path / "activations" / "my photos"
    code, *_ = visae(
        *("record", "--images", home / "photos", "--model", "test_vit", "--image-size", 32),
        *("--weights", home / "weights.safetensors", "--site", "norm", "--out", store),
    )
    assert code == 0
    before = ActivationStore(store).digest
    (store / "norm" / "00000.safetensors").write_bytes(b"cut short")
    (store / "images.parquet").write_bytes(b"cut short")
    said = visae("doctor", store)[1]
    remove, command = said.partition("to mend it, run: ")[2].strip().split(" && ")
    program, option, *damaged = shlex.split(remove)
    assert (program, option) == ("rm", "-f")
    assert {*map(Path, damaged)} == {store / "images.parquet", store / "shards" / "00000.json"}
    for path in damaged:
        Path(path).unlink()
    assert visae(*shlex.split(command)[1:])[0] == 0
    assert visae("doctor", store)[0] == 0
    assert ActivationStore(store).digest == before
