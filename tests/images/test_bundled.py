import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from visae.errors import ImageError
from visae.images.bundled import BundledImages
from visae.images.source import ImageEntry, ImageSource

DESCRIPTION = {
    "classes": ["cat", "owl"],
    "labels": [1, 0, 0, 1, 1],
    "tile": 4,
    "columns": 3,
    "source": "drawn at random",
    "licence": "CC0",
}


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def write_sheet(tmp_path, tiles):
    """A sheet of 3 columns and 2 rows, its last tile unused."""

    def write(height=8, **changes):
        sheet = np.zeros((8, 12, 3), np.uint8)
        for i, tile in enumerate(tiles):
            top, left = 4 * (i // 3), 4 * (i % 3)
            sheet[top : top + 4, left : left + 4] = tile
        Image.fromarray(sheet[:height]).save(tmp_path / "tiny.png")
        (tmp_path / "tiny.json").write_text(json.dumps(DESCRIPTION | changes))
        return tmp_path

    return write


def test_tiles_come_in_row_major_order_with_their_labels(write_sheet, tiles):
    source = BundledImages("tiny", folder=write_sheet())
    assert isinstance(source, ImageSource)
    assert source.location == "bundled:tiny"
    assert source.description.source == "drawn at random"
    labels = ["owl", "cat", "cat", "owl", "owl"]
    assert source.entries == tuple(
        ImageEntry(ref=str(i), label=label) for i, label in enumerate(labels)
    )
    for entry, tile in zip(source.entries, tiles, strict=True):
        image = source.load(entry.ref)
        assert image.pixels.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image.pixels), tile)
        assert image.content_id == hashlib.sha256(b"rgb8:4x4:" + tile.tobytes()).hexdigest()


def test_the_sheet_is_decoded_once(write_sheet):
    folder = write_sheet()
    source = BundledImages("tiny", folder=folder)
    first = source.load("0")
    (folder / "tiny.png").unlink()
    assert source.load("0").content_id == first.content_id


@pytest.mark.parametrize("ref", ["5", "-1", "x", "", "1.0", "²", "00", "9" * 5000])
def test_a_ref_that_is_no_image_is_refused(write_sheet, ref):
    with pytest.raises(ImageError, match="Give a number from 0 to 4"):
        BundledImages("tiny", folder=write_sheet()).load(ref)


def test_an_unknown_name_lists_the_nearest(write_sheet):
    with pytest.raises(ImageError, match="Choose one of: tiny"):
        BundledImages("tony", folder=write_sheet())


@pytest.mark.parametrize(
    "changes",
    [{"labels": [2]}, {"labels": [-1]}, {"labels": []}, {"tile": 0}, {"columns": 0}, {"more": 1}],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(write_sheet, changes):
    with pytest.raises(ImageError, match="SheetDescription"):
        BundledImages("tiny", folder=write_sheet(**changes))


def test_a_damaged_description_is_refused(write_sheet):
    folder = write_sheet()
    (folder / "tiny.json").write_text("{")
    with pytest.raises(ImageError, match="description cannot be read"):
        BundledImages("tiny", folder=folder)


def test_a_sheet_that_is_missing_or_too_small_is_refused(write_sheet):
    folder = write_sheet(height=7)
    with pytest.raises(ImageError, match=r"shape \(7, 12, 3\) does not fit"):
        BundledImages("tiny", folder=folder).load("0")
    (folder / "tiny.png").unlink()
    with pytest.raises(ImageError, match="sheet cannot be read"):
        BundledImages("tiny", folder=folder).load("0")
