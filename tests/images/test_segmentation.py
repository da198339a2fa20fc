import numpy as np
import pytest
from PIL import Image

from visae.errors import ImageError
from visae.images.opening import open_images
from visae.images.source import ImageEntry, ImageSource, MaskedSource
from visae.storage.hashing import hash_file


@pytest.fixture
def folder(tmp_path):
    """Images of noise and masks of values 0 to 3, in two splits."""
    rng = np.random.default_rng(0)
    for ref in ("train/a.jpg", "train/b.png", "val/a.png"):
        for half, shape in (("images", (6, 8, 3)), ("masks", (6, 8))):
            high = 256 if half == "images" else 4
            path = (tmp_path / half / ref).with_suffix(".png" if half == "masks" else ref[-4:])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(path)
    return tmp_path


def refused(location, what):
    with pytest.raises(ImageError, match=what) as caught:
        open_images(location)
    assert caught.value.fix
    return str(caught.value)


def test_pairs_are_found_by_their_paths(folder):
    source = open_images(f"seg:{folder}")
    assert isinstance(source, ImageSource)
    assert isinstance(source, MaskedSource)
    assert source.entries == (
        ImageEntry(ref="train/a.jpg", metadata={"folder": "train"}),
        ImageEntry(ref="train/b.png", metadata={"folder": "train"}),
        ImageEntry(ref="val/a.png", metadata={"folder": "val"}),
    )
    for entry in source.entries:
        image = source.load(entry.ref)
        mask_path = (folder / "masks" / entry.ref).with_suffix(".png")
        assert image.content_id == hash_file(folder / "images" / entry.ref)
        assert image.mask_id == hash_file(mask_path)
        assert image.mask.mode == "I"
        assert image.pixels.size == image.mask.size == (8, 6)
        np.testing.assert_array_equal(np.asarray(image.mask), np.asarray(Image.open(mask_path)))
    assert source.mask_classes == {}
    assert source.location == f"seg:{folder}"


def test_a_source_is_the_same_in_another_process(folder, sent):
    source = open_images(f"seg:{folder}")
    again = sent(source)
    assert again.entries == source.entries
    assert again.load("val/a.png").mask_id == source.load("val/a.png").mask_id


def test_a_split_is_one_subfolder_of_both(folder):
    source = open_images(f"seg:{folder}?split=val")
    assert source.entries == (ImageEntry(ref="a.png", metadata={"folder": None}),)
    assert open_images(source.location).entries == source.entries
    assert "holds: val" in refused(f"seg:{folder}?split=vla", "no such folder")


def test_halves_may_have_other_names(folder):
    (folder / "masks").rename(folder / "annotations")
    assert "holds: images" in refused(f"seg:{folder}", "no such folder")
    source = open_images(f"seg:{folder}?masks=annotations")
    assert len(source.entries) == 3
    assert open_images(source.location).load("val/a.png").mask is not None


@pytest.mark.parametrize("option", ["", "?classes=names/classes.csv"])
def test_classes_have_the_names_of_a_file(folder, option):
    path = folder / ("names/classes.csv" if option else "classes.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_text("0,sky\n1,road\n2,car\n3,unlabelled\n")
    source = open_images(f"seg:{folder}{option or '?'}&ignore=3".replace("?&", "?"))
    assert source.mask_classes == {0: "sky", 1: "road", 2: "car"}
    stored = np.asarray(Image.open(folder / "masks/val/a.png")).astype(int)
    found = np.asarray(source.load("val/a.png").mask)
    np.testing.assert_array_equal(found, np.where(stored == 3, -1, stored))
    assert open_images(source.location).mask_classes == source.mask_classes


def test_a_value_without_a_name_makes_its_image_unreadable(folder):
    (folder / "classes.txt").write_text("sky\nroad\n")
    Image.fromarray(np.array([[0, 1, 7, 3]], np.uint8)).resize((8, 6), 0).save(
        folder / "masks/val/a.png"
    )
    with pytest.raises(ImageError, match=r"without a name: 3,7 .*ignore=3,7"):
        open_images(f"seg:{folder}").load("val/a.png")
    image = open_images(f"seg:{folder}?ignore=3,7").load("val/a.png")
    assert set(np.asarray(image.mask).ravel().tolist()) == {-1, 0, 1}


def test_a_corrected_mask_changes_its_own_id_only(folder):
    source = open_images(f"seg:{folder}")
    before = source.load("val/a.png")
    Image.new("L", (8, 6), 2).save(folder / "masks/val/a.png")
    after = source.load("val/a.png")
    assert after.content_id == before.content_id
    assert after.mask_id != before.mask_id


def test_images_and_masks_alone_are_refused_by_name(folder):
    (folder / "masks/train/a.png").unlink()
    assert "1 images without a mask, the first being train/a" in refused(f"seg:{folder}", "There")
    (folder / "images/train/a.jpg").unlink()
    (folder / "images/val/a.png").unlink()
    assert "1 masks without an image, the first being val/a" in refused(f"seg:{folder}", "There")


def test_two_files_of_one_stem_are_refused(folder):
    Image.new("L", (8, 6)).save(folder / "masks/train/a.tif")
    refused(f"seg:{folder}", r"train/a.png and train/a.tif differ only in their suffix")


def test_a_mask_of_another_size_fails_alone(folder):
    Image.new("L", (7, 6)).save(folder / "masks/train/a.png")
    source = open_images(f"seg:{folder}")
    with pytest.raises(ImageError, match="mask is 7 × 6 pixels, its image 8 × 6"):
        source.load("train/a.jpg")
    assert source.load("train/b.png").mask is not None


def test_a_mask_that_vanished_fails_alone(folder):
    source = open_images(f"seg:{folder}")
    (folder / "masks/train/a.png").unlink()
    with pytest.raises(ImageError, match=r"file is missing \(mask of train/a.jpg"):
        source.load("train/a.jpg")


@pytest.mark.parametrize("ref", ["../masks/val/a.png", "val/b.png", ""])
def test_a_ref_that_is_not_listed_is_refused(folder, ref):
    with pytest.raises(ImageError, match="No image of this name"):
        open_images(f"seg:{folder}").load(ref)


def test_two_files_of_class_names_ask_for_a_choice(folder):
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    (folder / "classes.json").write_text('["a", "b", "c", "e"]')
    refused(f"seg:{folder}", r"several files of class names: classes.txt, classes.json")
    assert open_images(f"seg:{folder}?classes=classes.json").mask_classes[3] == "e"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("ignore=x", r"\?ignore=x cannot be read"),
        ("ignore=1,", r"\?ignore=1, cannot be read"),
        ("ignore=-1", r"\?ignore=-1 cannot be read"),
        ("exif=no", "none of: image, both"),
        ("mask=x", "unknown key mask"),
        ("classes=no.csv", "no such file of class names"),
    ],
)
def test_wrong_options_are_refused(folder, options, what):
    refused(f"seg:{folder}?{options}", what)


def test_a_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "camvid").mkdir()
    assert "holds: camvid" in refused(f"seg:{tmp_path}/camvi", "no such folder")
