import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from visae.errors import ImageError
from visae.images.opening import open_images
from visae.images.source import ImageEntry, ImageSource, MaskedSource
from visae.images.webdataset import WebDatasetImages
from visae.storage.hashing import hash_bytes


@pytest.fixture
def picture(encode):
    """The bytes of a small image, distinct for each seed."""

    def draw(seed, kind="PNG"):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        return encode(Image.fromarray(pixels), kind)

    return draw


@pytest.fixture
def write(tmp_path):
    """Write files into a tar archive."""

    def write_tar(files, name="shard.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for file, data in files.items():
                encoded = data if isinstance(data, bytes) else str(data).encode()
                info = tarfile.TarInfo(file)
                info.size = len(encoded)
                tar.addfile(info, io.BytesIO(encoded))
        return path

    return write_tar


def refused(location, what):
    with pytest.raises(ImageError, match=what) as caught:
        open_images(location)
    assert caught.value.fix


def test_samples_of_several_shards_come_in_order(write, picture, tmp_path, sent):
    for i in range(2):
        files = {f"{i}/x.jpg": picture(i, "JPEG"), f"{i}/x.cls": i, f"{i}/y.png": picture(i)}
        write(files, f"set-{i:02d}.tar")
    source = open_images(f"wds:{tmp_path}/set-{{00..01}}.tar")
    assert isinstance(source, WebDatasetImages)
    assert isinstance(source, ImageSource)
    assert not isinstance(source, MaskedSource)
    assert source.entries == (
        ImageEntry(ref="set-00.tar/0/x", label="0"),
        ImageEntry(ref="set-00.tar/0/y"),
        ImageEntry(ref="set-01.tar/1/x", label="1"),
        ImageEntry(ref="set-01.tar/1/y"),
    )
    for reader in (source, sent(source), open_images(source.location)):
        assert reader.entries == source.entries
        assert reader.load("set-01.tar/1/x").content_id == hash_bytes(picture(1, "JPEG"))
        image = reader.load("set-00.tar/0/y")
        assert image.content_id == hash_bytes(picture(0))
        assert (image.pixels.mode, image.pixels.size) == ("RGB", (8, 6))


def test_a_tar_file_opens_without_a_scheme(write, picture):
    path = write({"1.jpg": picture(0), "1.txt": "owl\n"})
    source = open_images(f"{path}?label=txt")
    assert source.entries == (ImageEntry(ref="shard.tar/1", label="owl"),)
    assert source.location == f"wds:{path}?label=txt"


def test_the_package_webdataset_reads_the_same(write, picture, tmp_path):
    wds = pytest.importorskip("webdataset.tariterators")

    def samples_of(path):
        with path.open("rb") as file:
            found = [one | {"__url__": path.name} for one in wds.tar_file_iterator(file)]
        return wds.group_by_keys(iter(found))

    files = {}
    for i in range(7):
        files |= {
            f"{i % 3}/im{i}.jpg": picture(i, "JPEG"),
            f"{i % 3}/im{i}.json": json.dumps({"n": i}),
            f"{i % 3}/im{i}.CLS": i % 2,
        }
    shards = [
        write({"README": "x", "__x__/1.jpg": "{}"} | files, "set-00.tar"),
        write({f"late/{name}": data for name, data in files.items()}, "set-01.tar"),
    ]
    ours = open_images(f"{tmp_path}/set-{{00..01}}.tar")
    theirs = [sample for path in shards for sample in samples_of(path)]
    assert len(theirs) == 14
    for entry, sample in zip(ours.entries, theirs, strict=True):
        assert entry.ref == f"{sample['__url__']}/{sample['__key__']}"
        assert entry.label == sample["cls"].decode()
        assert entry.metadata == {"n": str(json.loads(sample["json"])["n"])}
        assert ours.load(entry.ref).content_id == hash_bytes(sample["jpg"])


def test_fields_of_json_are_label_groups_and_metadata(write, picture):
    fields = [
        {"species": "owl", "site": 1, "age": 2.5, "wild": True, "box": [1, 2]},
        {"species": "", "site": 2, "note": "dark", "age": None},
    ]
    files = {}
    for i, found in enumerate(fields):
        files |= {f"{i}.png": picture(i), f"{i}.json": json.dumps(found), f"{i}.txt": "p1"}
    path = write(files)
    metadata = [
        {"age": "2.5", "wild": "True", "note": None},
        {"age": None, "wild": None, "note": "dark"},
    ]
    one = open_images(f"{path}?label=species&group=site")
    assert [(e.label, e.group) for e in one.entries] == [("owl", "1"), (None, "2")]
    assert [e.metadata for e in one.entries] == metadata
    several = open_images(f"{path}?group=site,txt")
    assert [e.group for e in several.entries] == ["site=1", "site=1"]
    assert several.entries[1].metadata["site"] == "2"
    refused(f"{path}?label=specie", r"nor a field 'specie' .*Choose one of: species")


@pytest.fixture
def masked(write, picture, encode):
    values = np.random.default_rng(0).integers(0, 4, (6, 8), np.uint8)
    mask = encode(Image.fromarray(values))
    return write({"1.png": picture(1), "1.seg.png": mask, "2.png": picture(2)}), values, mask


@pytest.mark.parametrize("option", ["", "&mask=seg.png"])
def test_masks_lie_beside_their_images(masked, tmp_path, option, sent):
    path, values, mask = masked
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\n")
    source = open_images(f"{path}?classes=names.txt&ignore=3{option}")
    assert isinstance(source, MaskedSource)
    assert source.mask_classes == {0: "sky", 1: "road", 2: "car"}
    for reader in (source, sent(source), open_images(source.location)):
        image = reader.load("shard.tar/1")
        assert image.mask_id == hash_bytes(mask)
        expected = np.where(values == 3, -1, values.astype(int))
        np.testing.assert_array_equal(np.asarray(image.mask), expected)
        assert reader.load("shard.tar/2").mask is None


def test_options_of_masks_need_masks(masked, write, picture):
    refused(f"{masked[0]}?mask=sge.png", r"No sample has a file \.sge\.png .*seg\.png")
    path = write({"1.png": picture(1)}, "plain.tar")
    refused(f"{path}?ignore=3", "no sample has a mask")


def test_several_images_ask_for_a_choice(write, picture):
    path = write({"1.left.jpg": b"", "1.jpg": picture(0), "1.png": picture(1)})
    refused(path, r"several images: jpg, png .*\?image=jpg")
    assert open_images(f"{path}?image=png").load("shard.tar/1").content_id == hash_bytes(picture(1))


def test_broken_samples_fail_one_by_one(write, picture):
    path = write(
        {"a.json": "{}", "b.jpg": b"", "c.jpg": b"x" * 99, "d.jpg": picture(0)[:60], "e.jpg": b""}
    )
    source = open_images(path)
    for key, reason in [
        ("a", "holds no image"),
        ("b", "file is empty"),
        ("c", "not an image"),
        ("d", "truncated|corrupt"),
        ("z", "No sample of this name"),
        ("../d", "No sample of this name"),
    ]:
        with pytest.raises(ImageError, match=reason):
            source.load(f"shard.tar/{key}")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("1.json", b"{", r"not valid JSON \(shard\.tar/1\.json"),
        ("1.json", b"[" * 100_000, "not valid JSON"),
        ("1.cls", b"\xff\xfe", r"not UTF-8 text \(shard\.tar/1\.cls"),
    ],
)
def test_a_broken_label_file_is_refused(write, picture, name, data, what):
    refused(write({"1.jpg": picture(0), name: data}), what)


def test_json_of_another_kind_says_nothing(write, picture):
    path = write({"1.jpg": picture(0), "1.json": "[1]", "2.jpg": picture(1), "2.json": "  "})
    assert [entry.metadata for entry in open_images(path).entries] == [{}, {}]


def test_archives_of_one_name_in_two_folders_are_told_apart(write, picture, tmp_path):
    for i, folder in enumerate(("train", "val")):
        write({"1.jpg": picture(i)}, f"{folder}/0.tar")
    source = open_images(f"wds:{tmp_path}/*/0.tar")
    assert [entry.ref for entry in source.entries] == ["train/0.tar/1", "val/0.tar/1"]
    assert source.load("val/0.tar/1").content_id == hash_bytes(picture(1))


def test_what_holds_no_samples_is_refused(write, tmp_path):
    refused(write({"README": "x"}), "hold no samples")
    refused(f"wds:{tmp_path}/*.tra", "No tar file fits")
    refused(f"{tmp_path}/none.tar", "no such tar file")
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b....")
    refused(f"{tmp_path}/set.tar.gz", r"compressed \(gzip\)")
    refused(f"wds:{tmp_path}/shard.tar?lable=x", "unknown key lable")
