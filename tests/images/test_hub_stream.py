import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from visae.errors import ImageError, VisaeError
from visae.images.hub import HubImages
from visae.images.hub_stream import HubStream
from visae.images.opening import open_images
from visae.images.source import ImageEntry, ImageSource, MaskedSource, StreamedSource
from visae.storage.hashing import hash_bytes

N_ROWS = 6


@pytest.fixture
def pictures(encode):
    rng = np.random.default_rng(0)
    shape = (N_ROWS, 3, 4, 3)
    return [encode(Image.fromarray(one)) for one in rng.integers(0, 256, shape, np.uint8)]


@pytest.fixture
def masks(encode):
    values = np.random.default_rng(1).integers(0, 3, (N_ROWS, 3, 4), np.uint8)
    return [encode(Image.fromarray(one)) for one in values]


@pytest.fixture
def location(tmp_path, pictures, masks, monkeypatch):
    """Two Parquet files as the hub stores them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "owl"]),
        "site": datasets.Value("int64"),
        "patient": datasets.Value("string"),
        "seg": datasets.Image(),
    }
    columns = {
        "image": [{"bytes": data, "path": None} for data in pictures],
        "label": [1, 0, -1, 1, 0, None],
        "site": [7, 7, 8, None, 9, 9],
        "patient": ["a", "b", "", "d", "e", "f"],
        "seg": [*({"bytes": data, "path": None} for data in masks[:-1]), None],
    }
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    (tmp_path / "set").mkdir()
    for i in range(2):
        part = rows.select(range(3 * i, 3 * i + 3))
        part.to_parquet(tmp_path / f"set/train-{i:05d}-of-00002.parquet")
    return f"hf:{tmp_path}/set:train?streaming=1&image=image"


def test_rows_come_with_what_they_say(location, pictures):
    source = open_images(f"{location}&n={N_ROWS}&group=site")
    assert isinstance(source, HubStream)
    assert isinstance(source, ImageSource)
    assert isinstance(source, StreamedSource)
    assert source.is_stream
    assert source.entries == tuple(ImageEntry(ref=str(i)) for i in range(N_ROWS))
    loaded = [source.load(entry.ref) for entry in source.entries]
    assert [image.content_id for image in loaded] == [hash_bytes(data) for data in pictures]
    labels, groups = ["owl", "cat", None, "owl", "cat", None], ["7", "7", "8", None, "9", "9"]
    patients = ["a", "b", None, "d", "e", "f"]
    assert [image.entry for image in loaded] == [
        ImageEntry(ref=str(i), label=label, group=group, metadata={"patient": patient})
        for i, (label, group, patient) in enumerate(zip(labels, groups, patients, strict=True))
    ]
    again = open_images(source.location)
    assert again.load("0").entry == loaded[0].entry


def test_a_stream_says_the_same_as_the_downloaded_rows(location):
    downloaded = HubImages(location.replace("streaming=1&", ""))
    stream = HubStream(f"{location}&n={N_ROWS}")
    for entry in downloaded.entries:
        assert stream.load(entry.ref).entry == entry
        assert stream.load(entry.ref).content_id == downloaded.load(entry.ref).content_id


def test_any_row_is_read_and_another_process_starts_anew(location, pictures, sent):
    source = HubStream(f"{location}&n={N_ROWS}")
    for ref in ("4", "1", "5", "0"):
        assert source.load(ref).content_id == hash_bytes(pictures[int(ref)])
    assert sent(source).load("2").content_id == hash_bytes(pictures[2])


def test_masks_stream_too(location, masks, sent):
    source = open_images(f"{location}&n={N_ROWS}&mask=seg&ignore=2")
    assert isinstance(source, MaskedSource)
    assert isinstance(source, StreamedSource)
    assert source.is_stream
    image = sent(source).load("1")
    assert image.mask_id == hash_bytes(masks[1])
    assert image.entry.label == "cat"
    assert set(np.asarray(image.mask).ravel().tolist()) == {-1, 0, 1}
    assert source.load("5").mask is None
    downloaded = open_images(location.replace("streaming=1", "mask=seg"))
    assert isinstance(downloaded, StreamedSource)
    assert not downloaded.is_stream


def test_the_number_of_rows_must_be_known(location, monkeypatch):
    with pytest.raises(ImageError, match=r"does not say how many .*Give how many to use"):
        HubStream(location)
    stated = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=4)})
    monkeypatch.setattr(datasets.IterableDataset, "info", datasets.DatasetInfo(splits=stated))
    assert len(HubStream(location).entries) == 4
    assert len(HubStream(f"{location}&n=3").entries) == 3
    with pytest.raises(ImageError, match=r"has 4 rows, fewer than \?n=5"):
        HubStream(f"{location}&n=5")


def test_rows_beyond_the_end_fail_one_by_one(location):
    source = HubStream(f"{location}&n=8")
    assert source.load("5").entry.ref == "5"
    for ref in ("6", "7"):
        with pytest.raises(ImageError, match=f"stream ends before row {ref}"):
            source.load(ref)
    with pytest.raises(ImageError, match="number from 0 to 7"):
        source.load("8")


def test_what_a_stream_cannot_do_is_refused(location, tmp_path):
    with pytest.raises(ImageError, match="several columns need all rows"):
        HubStream(f"{location}&n=6&group=site,patient")
    with pytest.raises(ImageError, match="none of: 1"):
        HubStream(location.replace("streaming=1", "streaming=yes"))
    rows = datasets.Dataset.from_dict({"x": [1]})
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ImageError, match=r"saved dataset .*Leave \?streaming=1 out"):
        HubStream(f"hf:{tmp_path}/saved?streaming=1&n=1")


def test_columns_that_are_not_stated_are_refused(location, monkeypatch):
    monkeypatch.setattr(datasets.IterableDataset, "features", None)
    with pytest.raises(ImageError, match="does not say which columns"):
        HubStream(f"{location}&n=6")


@pytest.fixture
def elsewhere(tmp_path, pictures, monkeypatch):
    """A table of addresses of images that lie on another file system."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with fsspec.open("memory://there.png", "wb") as file:
        file.write(pictures[0])
    paths = ["memory://there.png", "memory://gone.png", "nowhere://x.png", None]
    cells = [path and {"bytes": None, "path": path} for path in paths]
    kinds = datasets.Features({"image": datasets.Image()})
    (tmp_path / "far").mkdir()
    table = datasets.Dataset.from_dict({"image": cells}, features=kinds).with_format("arrow")[:]
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "far/train.parquet")
    return f"hf:{tmp_path}/far?streaming=1&n=4"


def test_images_that_lie_elsewhere_are_fetched(elsewhere, pictures):
    source = HubStream(elsewhere)
    assert source.load("0").content_id == hash_bytes(pictures[0])
    with pytest.raises(ImageError, match="The file is missing"):
        source.load("1")
    with pytest.raises(VisaeError, match="cannot be read") as caught:
        source.load("2")
    assert not isinstance(caught.value, ImageError)
    with pytest.raises(ImageError, match="holds no image"):
        source.load("3")
