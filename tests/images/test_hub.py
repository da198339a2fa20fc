import sys

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from visae.errors import ImageError
from visae.images.hub import HubImages
from visae.images.hub_address import HubAddress
from visae.images.opening import open_images
from visae.images.source import ImageEntry, ImageSource, MaskedSource
from visae.storage.hashing import hash_bytes


@pytest.fixture
def pictures(encode):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (3, 4, 3), dtype=np.uint8) for _ in range(3)]
    return [encode(Image.fromarray(array)) for array in arrays]


@pytest.fixture
def save(tmp_path, pictures):
    """Save rows with an image column, a class column and whatever else is given."""

    def save_rows(*, splits=None, features=None, **columns):
        features = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "owl"]),
        } | (features or {})
        given = {"image": [{"bytes": data, "path": None} for data in pictures], "label": [1, 0, -1]}
        given |= columns
        features = {name: kind for name, kind in features.items() if given[name] is not None}
        given = {name: cells for name, cells in given.items() if cells is not None}
        rows = datasets.Dataset.from_dict(given, features=datasets.Features(features))
        saved = datasets.DatasetDict(dict.fromkeys(splits, rows)) if splits else rows
        saved.save_to_disk(tmp_path / "saved")
        return f"hf:{tmp_path}/saved"

    return save_rows


def test_a_saved_dataset_gives_rows_with_class_names_and_stored_bytes(save, pictures):
    source = open_images(save())
    assert isinstance(source, HubImages)
    assert isinstance(source, ImageSource)
    assert source.entries == (
        ImageEntry(ref="0", label="owl"),
        ImageEntry(ref="1", label="cat"),
        ImageEntry(ref="2", label=None),
    )
    for entry, data in zip(source.entries, pictures, strict=True):
        image = source.load(entry.ref)
        assert image.content_id == hash_bytes(data)
        assert (image.pixels.mode, image.pixels.size) == ("RGB", (4, 3))
    assert open_images(source.location).entries == source.entries


def test_splits_of_a_saved_dataset_are_chosen_by_name(save):
    location = save(splits=["train", "test"])
    assert HubImages(location).location == location
    assert HubImages(f"{location}:test").location == f"{location}:test"
    with pytest.raises(ImageError, match=r"no split tests .*Choose one of: test"):
        HubImages(f"{location}:tests")


def test_a_saved_dataset_without_splits_has_no_split(save):
    with pytest.raises(ImageError, match="no splits, so none called test"):
        HubImages(f"{save()}:test")


def test_label_and_group_columns_are_chosen_by_options(save):
    numbers = {"site": datasets.Value("int64"), "kind": datasets.Value("string")}
    location = save(features=numbers, site=[1, 1, None], kind=["a", "", "b"])
    source = HubImages(f"{location}?label=kind&group=site")
    assert [(e.label, e.group) for e in source.entries] == [("a", "1"), (None, "1"), ("b", None)]
    assert [e.metadata["label"] for e in source.entries] == ["owl", "cat", None]
    assert source.location == f"{location}?label=kind&group=site"
    with pytest.raises(ImageError, match=r"no column 'sit' .*Choose one of: site"):
        HubImages(f"{location}?group=sit")
    with pytest.raises(ImageError, match="not one value a row"):
        HubImages(f"{location}?group=image")


def test_a_dataset_without_class_column_has_no_labels(save):
    assert [entry.label for entry in HubImages(save(label=None)).entries] == [None] * 3


def test_two_class_columns_ask_for_a_choice(save):
    second = {"fine": datasets.ClassLabel(names=["x"])}
    location = save(features=second, fine=[0, 0, 0])
    with pytest.raises(ImageError, match=r"label, fine .*\?label=COLUMN"):
        HubImages(location)
    assert HubImages(f"{location}?label=fine").entries[0].label == "x"


def test_two_image_columns_ask_for_a_choice(save, pictures):
    reversed_pictures = [{"bytes": data, "path": None} for data in pictures[::-1]]
    location = save(features={"depth": datasets.Image()}, depth=reversed_pictures)
    with pytest.raises(ImageError, match=r"image, depth; .*\?image=COLUMN"):
        HubImages(location)
    assert HubImages(f"{location}?image=depth").load("0").content_id == hash_bytes(pictures[2])
    with pytest.raises(ImageError, match="none is called label"):
        HubImages(f"{location}?image=label")


def test_a_dataset_without_images_is_refused(save):
    with pytest.raises(ImageError, match="no column of images among label"):
        HubImages(save(image=None))


def test_a_saved_dataset_without_rows_is_refused(save):
    with pytest.raises(ImageError, match="cannot be loaded"):
        HubImages(save(image=[], label=[]))


def test_rows_that_are_missing_empty_or_broken_fail_one_by_one(save):
    broken = [None, {"bytes": b"no image", "path": None}, {"bytes": b"", "path": None}]
    source = HubImages(save(image=broken))
    for ref, reason in [
        ("0", "holds no image"),
        ("1", "not an image"),
        ("2", "file is empty"),
        ("3", "number from 0 to 2"),
        ("x", "number from 0 to 2"),
    ]:
        with pytest.raises(ImageError, match=reason):
            source.load(ref)


def test_a_folder_that_load_dataset_reads_gives_files(tmp_path, write_image, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i, ref in enumerate(("cat/a.png", "owl/b.png")):
        write_image(tmp_path / "set/train" / ref, seed=i)
    source = HubImages(f"hf:{tmp_path}/set")
    assert [entry.label for entry in source.entries] == ["cat", "owl"]
    data = (tmp_path / "set/train/owl/b.png").read_bytes()
    assert source.load("1").content_id == hash_bytes(data)
    assert [e.label for e in HubImages(f"hf:{tmp_path}/set:train[1:]").entries] == ["owl"]
    with pytest.raises(ImageError, match="corresponds to no data"):
        HubImages(f"hf:{tmp_path}/set:train[:0]")
    with pytest.raises(ImageError, match="cannot be loaded: Unknown split"):
        HubImages(f"hf:{tmp_path}/set:validation")


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "saved").mkdir()
    with pytest.raises(ImageError, match="holds: saved"):
        HubImages(f"hf:{tmp_path}/saves:train")


@pytest.mark.parametrize(
    ("location", "name", "split"),
    [
        ("hf://owner/dataset", "owner/dataset", None),
        ("hf://owner/dataset:test", "owner/dataset", "test"),
        ("hf://mnist:train", "mnist", "train"),
        ("hf://owner/dataset:train?config=160px&revision=abc", "owner/dataset", "train"),
    ],
)
def test_addresses_of_the_hub_are_taken_apart_and_put_together(location, name, split):
    address = HubAddress.parse(location)
    assert (address.name, address.split, address.is_local) == (name, split, False)
    assert str(address) == location


@pytest.mark.parametrize("location", ["hf://", "hf://a/b/c", "hf://a/", "hf:///b", "hf://:train"])
def test_what_is_no_address_of_the_hub_is_refused(location):
    with pytest.raises(ImageError, match="no dataset of the hub"):
        HubAddress.parse(location)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ImageError, match=r"unknown key imag \(did you mean: image"):
        HubImages("hf://owner/dataset?imag=x")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImageError, match=r"pip install 'visae\[datasets\]'"):
        HubImages("hf://owner/dataset")


@pytest.fixture
def empty_place(tmp_path, monkeypatch):
    """A working folder that is also the cache, both empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path


def test_offline_a_dataset_that_was_never_downloaded_is_an_error(empty_place):
    with pytest.raises(ImageError, match=r"no copy on this machine, .*Unset HF_HUB_OFFLINE"):
        HubImages("hf://owner/dataset")
    assert list(empty_place.iterdir()) == []


@pytest.fixture
def no_hub(empty_place, monkeypatch):
    """Online by the settings, but nothing answers."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    return empty_place


def test_an_unreachable_hub_is_an_error_without_retries_and_without_traces(no_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to retry"))
    with pytest.raises(ImageError, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        HubImages("hf://owner/dataset")
    assert list(no_hub.iterdir()) == []
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_hub_a_copy_on_this_machine_is_used(no_hub, save, monkeypatch):
    copy = datasets.load_from_disk(save().removeprefix("hf:"))
    asked = []

    def load_copy(*what, **which):
        assert datasets.config.HF_HUB_OFFLINE
        asked.append((what, which))
        return copy

    monkeypatch.setattr(datasets, "load_dataset", load_copy)
    source = HubImages("hf://owner/dataset:test?config=160px&revision=abc")
    which = {"split": "test", "revision": "abc", "streaming": False}
    assert asked == [(("owner/dataset", "160px"), which)]
    assert len(source.entries) == 3


def test_what_a_reachable_hub_lacks_is_told_by_its_own_words(no_hub, monkeypatch):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/datset' doesn't exist.")

    monkeypatch.setattr("visae.storage.hub._answers", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ImageError, match="cannot be loaded: Dataset 'owner/datset' doesn't exist"):
        HubImages("hf://owner/datset")


def test_a_folder_of_the_same_name_is_never_taken_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/dataset").mkdir(parents=True)
    with pytest.raises(ImageError, match="Write hf:owner/dataset for the folder"):
        HubImages("hf://owner/dataset")


def test_other_columns_are_metadata_and_several_groups_are_joined(save):
    more = {
        "patient": datasets.Value("string"),
        "site": datasets.Value("int64"),
        "box": datasets.Sequence(datasets.Value("int64")),
        "raw": datasets.Value("binary"),
    }
    columns = {"patient": ["p1", "p2", "p3"], "site": [1, 1, 2], "box": [[1]] * 3, "raw": [b""] * 3}
    location = save(features=more, **columns)
    source = HubImages(location)
    assert source.entries[2].metadata == {"patient": "p3", "site": "2"}
    source = HubImages(f"{location}?group=patient,site")
    assert [e.group for e in source.entries] == ["patient=p1", "patient=p1", "patient=p3"]
    assert source.entries[1].metadata == {"patient": "p2", "site": "1"}
    with pytest.raises(ImageError, match="not one value a row"):
        HubImages(f"{location}?group=patient,box")


def test_the_first_rows_alone_are_asked_for_by_number(save):
    location = save()
    source = HubImages(f"{location}?n=2")
    assert [e.label for e in source.entries] == ["owl", "cat"]
    assert len(open_images(source.location).entries) == 2
    for wrong in ("0", "x", "-1", "1.5", "9" * 30, ""):
        with pytest.raises(ImageError, match=r"no number of rows|cannot be read"):
            HubImages(f"{location}?n={wrong}")
    with pytest.raises(ImageError, match=r"has 3 rows, fewer than \?n=4"):
        HubImages(f"{location}?n=4")


@pytest.fixture
def masks(encode):
    values = np.random.default_rng(0).integers(0, 3, (2, 3, 4), np.uint8)
    return values, [encode(Image.fromarray(one)) for one in values]


def test_a_column_of_masks_gives_masks(save, masks, pictures, tmp_path, sent, monkeypatch):
    values, encoded = masks
    cells = [*({"bytes": data, "path": None} for data in encoded), None]
    location = save(features={"seg": datasets.Image()}, seg=cells)
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    monkeypatch.chdir(tmp_path)
    source = open_images(f"{location}?mask=seg&classes=names.txt&ignore=2")
    assert isinstance(source, MaskedSource)
    assert source.mask_classes == {0: "sky", 1: "road"}
    monkeypatch.chdir("/")
    for reader in (source, sent(source), open_images(source.location)):
        image = reader.load("1")
        assert image.content_id == hash_bytes(pictures[1])
        assert image.mask_id == hash_bytes(encoded[1])
        expected = np.where(values[1] == 2, -1, values[1].astype(int))
        np.testing.assert_array_equal(np.asarray(image.mask), expected)
        assert reader.load("2").mask is None
    with pytest.raises(ImageError, match=r"called sge .*Choose one of: seg"):
        open_images(f"{location}?mask=sge")
    with pytest.raises(ImageError, match="no column of masks is named"):
        open_images(f"{location}?image=image&ignore=2")


def test_a_source_is_the_same_in_another_process(save, pictures, sent):
    source = HubImages(save())
    again = sent(source)
    assert again.entries == source.entries
    assert again.load("2").content_id == hash_bytes(pictures[2])
