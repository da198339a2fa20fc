"""Bad input: each one paragraph that says what, where and what to do, and exit code 2."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visae.cli import main
from visae.errors import ExperimentError
from visae.storage import atomic


@pytest.fixture
def recording(record_arguments, tmp_path):
    """The arguments of a recording with one of them replaced."""

    def arguments(**changes):
        found = [str(argument) for argument in record_arguments(tmp_path / "store")]
        for name, value in changes.items():
            found[found.index(f"--{name.replace('_', '-')}") + 1] = str(value)
        return found

    return arguments


def listing(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name != ".lock")


# record


def test_a_missing_folder(fails, recording, home, tmp_path):
    said = fails(*recording(images=home / "photo"))
    assert "There is nothing of this name" in said
    assert "photos" in said
    assert not (tmp_path / "store").exists()


def test_a_folder_without_images(fails, recording, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    said = fails(*recording(images=tmp_path / "empty"))
    assert "holds no image, but 1 other file" in said
    assert ".png" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder(fails, recording, tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "cannot be opened" in fails(*recording(images=tmp_path / "closed"))


def test_a_file_in_place_of_a_folder(fails, recording, home):
    assert "is no list of images" in fails(*recording(images=home / "weights.safetensors"))


def test_images_none_of_which_can_be_read(fails, recording, tmp_path):
    for i in range(3):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"not a picture")
    said = fails(*recording(images=tmp_path / "bad"))
    assert "None of the 3 images can be read; the first: 0.png" in said
    assert "skipped.csv" in said


def test_odd_images_are_recorded_and_bad_ones_counted(visae, recording, tmp_path):
    """RGBA, grey, 16-bit and rotated images are images; corrupt, cut and huge ones are skipped."""
    folder = tmp_path / "odd"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "turned.jpg", exif=exif)
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    data = (folder / "turned.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    code, said, _ = visae(*recording(images=folder))
    assert code == 0
    assert "Recorded 4 images" in said
    assert "2 images were skipped" in said
    text = (tmp_path / "store" / "skipped.csv").read_text()
    assert "corrupt.png" in text
    assert "cut.jpg" in text


def test_strict_stops_at_the_first_bad_image(fails, recording, home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "blue" / "01.png").write_bytes(b"not a picture")
    said = fails(*recording(images=tmp_path / "photos"), "--strict")
    assert "blue/01.png" in said


def test_an_unknown_model_names_the_nearest(fails, recording):
    said = fails(*recording(model="test_vti"))
    assert "There is no timm model named test_vti" in said
    assert "test_vit" in said.split("nearest names")[1]


def test_an_unknown_site_names_the_nearest(fails, recording, tmp_path):
    said = fails(*recording(site="residual@99"))
    assert "has no site residual@99" in said
    assert "6 blocks" in said
    assert "residual@" in said.split("Use one of")[1]
    assert not (tmp_path / "store" / "store.json").exists()


def test_a_hub_that_cannot_be_reached(fails, recording, tmp_path):
    arguments = recording()
    at = arguments.index("--weights")
    said = fails(*arguments[:at], *arguments[at + 2 :])
    assert "not in the local cache and the model hub cannot be reached" in said
    assert "--weights" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing.safetensors", "missing"), ("weights.bin", "safetensors files only")],
)
def test_weights_that_cannot_be_read(fails, recording, tmp_path, name, said):
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    assert said in fails(*recording(weights=tmp_path / name))


def test_weights_of_another_model(fails, recording, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    said = fails(*recording(weights=tmp_path / "other.safetensors"))
    assert "Cannot build test_vit with these weights" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 8}, "Cannot build"),
        ({"image_size": 0}, "Cannot build"),
        ({"site": "mlp@zero"}, "has no site mlp@zero"),
        ({"images": "hf://x"}, "hf"),
        ({"images": "a.csv?label"}, "a.csv"),
    ],
)
def test_settings_that_cannot_be(fails, recording, changes, said):
    assert said in fails(*recording(**changes))


@pytest.mark.parametrize("setting", ["--batch-size", "--shard-mb"])
def test_numbers_that_cannot_be(fails, recording, setting):
    assert "must be positive" in fails(*recording(), setting, 0)


def test_another_recording_in_the_folder(fails, recording, workspace, record_arguments):
    said = fails(*record_arguments(workspace / "activations" / "photos", "--tokens", "patches"))
    assert "This folder holds another recording (tokens: 'all' there, 'patches' now)" in said


def test_a_file_where_the_folder_should_be(fails, record_arguments, tmp_path):
    (tmp_path / "file").write_text("x")
    said = fails(*record_arguments(tmp_path / "file" / "store"))
    assert "Cannot write: not a directory" in said


# A full disk


def full_disk(monkeypatch, after=0):
    """From the given write on, the disk has no space left."""
    writes = []
    flush = atomic._flush

    def fill(path):
        writes.append(path)
        if len(writes) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(atomic, "_flush", fill)


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_full_disk_while_recording(fails, visae, recording, monkeypatch, tmp_path, after):
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        said = fails(*recording())
    assert "Cannot write: no space left on device" in said
    assert "Free space" in said
    assert not [name for name in listing(tmp_path / "store") if name.startswith(".")]
    assert visae(*recording())[0] == 0


def test_a_full_disk_in_every_other_verb(fails, visae, own_workspace, train_arguments, monkeypatch):
    store, sae = own_workspace / "activations" / "photos", own_workspace / "saes" / "first"
    spec, features = own_workspace / "specs" / "red.toml", own_workspace / "features" / "new"
    verbs = [
        train_arguments(store, own_workspace / "saes" / "new"),
        ["evaluate", "--sae", sae, "--store", store, "--no-fidelity"],
        ["index", "--sae", sae, "--store", store, "--out", features],
        ["intervene", spec, "--out", own_workspace / "experiments" / "red"],
        ["report", sae, "--out", own_workspace / "report"],
    ]
    for arguments in verbs:
        with monkeypatch.context() as patch:
            full_disk(patch, after=2 if arguments[0] in ("index", "intervene") else 0)
            assert "no space left on device" in fails(*arguments)
        assert visae(*arguments)[0] == 0, arguments


def test_a_disk_too_small_for_the_store_is_told_first(fails, recording, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    said = fails(*recording())
    assert "more and the disk has 1 kB free" in said
    assert not list((tmp_path / "store").rglob("*.safetensors"))


# What does not belong together


@pytest.fixture
def other_store(home, own_workspace, visae):
    """The same photos under a model of the same architecture with other weights."""
    from safetensors.torch import load_file, save_file

    state = {k: v * 1.5 for k, v in load_file(home / "weights.safetensors").items()}
    save_file(state, own_workspace / "other.safetensors")
    out = own_workspace / "activations" / "other"
    code, *_ = visae(
        *("record", "--images", home / "photos", "--model", "test_vit", "--image-size", 32),
        *("--weights", own_workspace / "other.safetensors", "--site", "residual@2"),
        *("--out", out),
    )
    assert code == 0
    return out


def test_a_store_of_another_model(fails, own_workspace, other_store, write_spec):
    sae = own_workspace / "saes" / "first"
    for arguments in (
        ["evaluate", "--sae", sae, "--store", other_store],
        ["index", "--sae", sae, "--store", other_store, "--out", own_workspace / "x"],
        [
            *("intervene", write_spec("activations/photos", "activations/other")),
            *("--out", own_workspace / "y"),
        ],
    ):
        said = fails(*arguments)
        assert "This SAE was not made for this store (model: test_vit (" in said
        assert "Give the store that the SAE was trained on" in said


def test_weights_that_are_not_those_of_the_store(fails, own_workspace, other_store):
    said = fails(
        *("intervene", own_workspace / "specs" / "red.toml", "--out", own_workspace / "x"),
        *("--weights", own_workspace / "other.safetensors"),
    )
    assert "with other weights than" in said


def test_images_that_are_not_those_of_the_store(fails, own_workspace, home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "blue" / "00.png")
    spec = own_workspace / "specs" / "red.toml"
    arguments = ["intervene", spec, "--out", own_workspace / "x", "--images"]
    assert "its content differs" in fails(*arguments, tmp_path / "photos")
    (tmp_path / "photos" / "blue" / "02.png").unlink()
    assert "recorded images are not there" in fails(*arguments, tmp_path / "photos")


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_truncated_shard(fails, own_workspace, train_arguments):
    store = own_workspace / "activations" / "photos"
    truncate(store / "residual@2" / "00000.safetensors")
    for arguments in (
        train_arguments(store, own_workspace / "saes" / "new"),
        ["intervene", own_workspace / "specs" / "red.toml", "--out", own_workspace / "x"],
    ):
        said = fails(*arguments)
        assert "00000.safetensors" in said
        assert "altered or cut short" in said


def test_an_unfinished_store(fails, own_workspace, train_arguments):
    store = own_workspace / "activations" / "photos"
    (store / "shards" / "00000.json").unlink()
    said = fails(*train_arguments(store, own_workspace / "saes" / "new"))
    assert "incomplete: 1 of 1 shards are missing" in said
    assert "Run the same visae record command again" in said


def test_an_altered_checkpoint(fails, own_workspace):
    sae, store = own_workspace / "saes" / "first", own_workspace / "activations" / "photos"
    path = sae / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)
    for arguments in (
        ["evaluate", "--sae", sae, "--store", store],
        ["index", "--sae", sae, "--store", store, "--out", own_workspace / "x"],
        ["intervene", own_workspace / "specs" / "red.toml", "--out", own_workspace / "y"],
    ):
        said = fails(*arguments)
        assert "checksum differs" in said
        assert str(path) in said


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["train", "--store", "nowhere", "--out", "x"], "There is no activation store here"),
        (["evaluate", "--sae", "nowhere", "--store", "nowhere"], "no activation store here"),
        (["index", "--sae", "nowhere", "--store", "nowhere", "--out", "x"], "no activation store"),
        (["intervene", "nowhere.toml", "--out", "x"], "There is no such file"),
        (["report", "nowhere", "--out", "x"], "nothing here to report on"),
        (["doctor", "nowhere"], "no store, SAE, index or experiment"),
        (["evaluate", "--sae", "--store", "nowhere"], "No SAE is given"),
    ],
)
def test_nothing_where_something_should_be(fails, tmp_path, monkeypatch, verb, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(*verb)
    assert listing(tmp_path) == []


def test_an_sae_that_is_not_there(fails, own_workspace):
    store = own_workspace / "activations" / "photos"
    said = fails("index", "--sae", "nowhere", "--store", store, "--out", own_workspace / "x")
    assert "There is no SAE here (nowhere)" in said
    assert "visae train" in said


# train


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", 49], "k"),
        (["--k", 0], "k is 0"),
        (["--batch-size", 100000], "batch"),
        (["--n-tokens", 10], "less than one batch"),
        (["--n-tokens", 0], "must be positive"),
        (["--l1", -1, "--kind", "relu"], "l1 is -1"),
        (["--learning-rate", 0], "learning_rate is 0"),
        (["--seeds", 1, 1], "different names"),
        (["--seeds"], "different names"),
        (["--n-features", 0], "n_features is 0"),
        (["--n-features", -5], "n_features is -5"),
    ],
)
def test_trainings_that_cannot_be(fails, workspace, train_arguments, tmp_path, arguments, said):
    store = workspace / "activations" / "photos"
    assert said in fails(*train_arguments(store, tmp_path / "a", *arguments))


def test_another_sae_in_the_folder(fails, workspace, train_arguments):
    store, sae = workspace / "activations" / "photos", workspace / "saes" / "first"
    said = fails(*train_arguments(store, sae, "--k", 2))
    assert "run.sparsity.k: 3 then, 2 now" in said
    assert "choose another --out" in said


def test_a_site_that_was_not_recorded(fails, workspace, tmp_path):
    store = workspace / "activations" / "photos"
    said = fails("train", "--store", store, "--out", tmp_path / "a", "--site", "residual@3")
    assert "no site residual@3" in said
    assert "residual@2" in said


# intervene


def test_a_misspelt_key(fails, write_spec, own_workspace):
    path = write_spec("smallest_effect", "smalest_effect")
    said = fails("intervene", path, "--out", own_workspace / "x")
    assert "unknown key prediction.smalest_effect (did you mean: smallest_effect" in said
    assert str(path) in said
    assert not (own_workspace / "x").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('class_name = "red"\n\n[task]', 'class_name = "rde"\n\n[task]', "the label rde"),
        ("n_matched = 5", "n_matched = 500", "other features fire on the discovery images"),
        ('pool = "mean-patch"', 'site = "residual@2"', "does not hold the model's final tokens"),
        ('pool = "mean-patch"', 'pool = "max"', "task.pool"),
        ("n_resamples = 1000", "n_resamples = 10", "n_resamples is 10"),
        ("../saes/first", "../saes/frist", "There is no SAE here"),
        ("[controls]", "[split]\nconfirmation_share = 1.5\n[controls]", "confirmation_share"),
        ('name = "red"', 'format = 2\nname = "red"', "Upgrade visae"),
        ("[selection]", "[selection", "not valid TOML"),
    ],
)
def test_specs_that_cannot_be_run(fails, write_spec, own_workspace, old, new, said):
    assert said in fails("intervene", write_spec(old, new), "--out", own_workspace / "x")
    assert not (own_workspace / "x" / "registration.json").exists()


@pytest.mark.usefixtures("no_page")
def test_confirmation_images_that_chose_the_feature(fails, visae, write_spec, own_workspace):
    sae, store = own_workspace / "saes" / "first", own_workspace / "activations" / "photos"
    chosen = '[selection]\nkind = "feature"\nfeature = {}\nchosen_from = "../features/first@photos"'
    old = '[selection]\nkind = "best-for-class"\nclass_name = "red"'
    out = own_workspace / "experiments" / "seen"
    visae("intervene", write_spec(), "--out", own_workspace / "first", "--register-only")
    feature = json.loads((own_workspace / "first" / "registration.json").read_text())["feature"]
    path = write_spec(old, chosen.format(feature))
    said = fails("intervene", path, "--out", out)
    assert "of the confirmation images were seen when the feature was chosen" in said
    assert "--side discovery" in said
    assert "--exploratory" in said
    assert not (out / "registration.json").exists()
    code, text, _ = visae("intervene", path, "--out", out, "--exploratory")
    assert code == 0
    assert "[exploratory]" in text
    assert "Note: it was run with --exploratory." in text

    index = own_workspace / "features" / "discovery"
    visae("index", "--sae", sae, "--store", store, "--out", index, "--side", "discovery")
    path = write_spec(old, chosen.format(feature).replace("first@photos", "discovery"))
    code, text, _ = visae("intervene", path, "--out", own_workspace / "experiments" / "unseen")
    assert code == 0
    assert "[confirmatory]" in text


@pytest.mark.usefixtures("no_page")
def test_a_finished_result_is_kept(fails, visae, write_spec, own_workspace):
    out = own_workspace / "experiments" / "red"
    assert visae("intervene", write_spec(), "--out", out)[0] == 0
    before = (out / "result.json").read_bytes()
    said = fails("intervene", write_spec("n_random = 19", "n_random = 20"), "--out", out)
    assert "finished result of another experiment (changed: spec)" in said
    assert "Choose another --out" in said
    assert (out / "result.json").read_bytes() == before


def test_flags_that_exclude_each_other(fails, write_spec, own_workspace):
    said = fails(
        *("intervene", write_spec(), "--out", own_workspace / "x"),
        *("--register-only", "--exploratory"),
    )
    assert "Give one of them" in said


def test_the_same_error_with_its_trace(write_spec, own_workspace):
    path = write_spec("smallest_effect", "smalest_effect")
    with pytest.raises(ExperimentError, match="smalest_effect"):
        main(["intervene", str(path), "--out", str(own_workspace / "x"), "--traceback"])


def test_a_device_that_is_not_there(fails, recording, write_spec, own_workspace):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "Cannot use device cuda" in fails(*recording(), "--device", "cuda")
    arguments = ["intervene", write_spec(), "--out", own_workspace / "x", "--device", "nonsense"]
    assert "Cannot use device nonsense" in fails(*arguments)


def test_no_message_holds_a_line_break(fails, own_workspace):
    """Whatever a parser or a library says, an error stays one paragraph."""
    path = Path(own_workspace / "specs" / "odd.toml")
    path.write_text('name = "a\nb"')
    assert "\n" not in fails("intervene", path, "--out", own_workspace / "x").rstrip("\n")
