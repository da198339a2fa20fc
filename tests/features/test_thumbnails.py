import numpy as np
import pytest
from PIL import Image

from visae.errors import FeatureIndexError, ImageError
from visae.features.thumbnails import (
    read_thumbnail,
    thumbnail_bytes,
    thumbnail_path,
    write_thumbnails,
)
from visae.images.source import ImageEntry, LoadedImage
from visae.models.preprocessing import Preprocessing


class Squares:
    """Wide images with a pale rectangle in the middle; counts what is loaded."""

    location = "squares:"

    def __init__(self, size=(60, 40)):
        self.entries = [ImageEntry(ref=str(i)) for i in range(3)]
        self.loaded = []
        self.size = size

    def load(self, ref):
        if ref == "broken":
            raise ImageError("The image is truncated", where=ref)
        self.loaded.append(ref)
        image = Image.new("RGB", self.size, (40, 40, 40))
        width, height = self.size
        image.paste((210, 210, 210), (width // 3, height // 4, 2 * width // 3, 3 * height // 4))
        return LoadedImage(f"{int(ref):064x}", image)


def items(source, *refs):
    return [(ImageEntry(ref=ref), f"{int(ref):064x}") for ref in refs or ("0", "1", "2")]


def test_a_thumbnail_is_what_the_model_saw(tmp_path):
    source, preprocessing = Squares(), Preprocessing(size=(32, 32), crop_share=0.875)
    assert list(write_thumbnails(tmp_path, items(source), source, preprocessing.view)) == [1, 2, 3]
    view = np.asarray(preprocessing.view(source.load("0").pixels), dtype=float)
    found = np.asarray(read_thumbnail(tmp_path, f"{0:064x}"), dtype=float)
    assert found.shape == (32, 32, 3)
    assert np.abs(found - view).mean() < 6


def test_what_is_there_is_not_made_again(tmp_path):
    source, preprocessing = Squares(), Preprocessing(size=(8, 8))
    list(write_thumbnails(tmp_path, items(source, "1"), source, preprocessing.view))
    source.loaded.clear()
    list(write_thumbnails(tmp_path, items(source), source, preprocessing.view))
    assert sorted(source.loaded) == ["0", "2"]


def test_large_views_are_scaled_down_as_a_whole(tmp_path):
    source = Squares(size=(1200, 800))
    list(
        write_thumbnails(tmp_path, items(source, "0"), source, Preprocessing(size=(400, 800)).view)
    )
    assert read_thumbnail(tmp_path, f"{0:064x}").size == (384, 192)


def test_an_image_that_cannot_be_read_any_more_is_refused(tmp_path):
    source = Squares()
    broken = [(ImageEntry(ref="broken"), "ab")]
    with pytest.raises(
        FeatureIndexError, match=r"cannot be read: The image is truncated.*--images"
    ):
        list(write_thumbnails(tmp_path, broken, source, Preprocessing(size=(8, 8)).view))
    assert not list((tmp_path / "thumbnails").glob("*"))


@pytest.mark.parametrize("content_id", ["../../etc/passwd", "a/b", "", ".hidden", "a\x00", "é"])
def test_a_content_id_never_leads_elsewhere(tmp_path, content_id):
    with pytest.raises(FeatureIndexError, match="cannot name a file"):
        thumbnail_path(tmp_path, content_id)


def test_a_missing_or_damaged_thumbnail_is_refused(tmp_path):
    with pytest.raises(FeatureIndexError, match=r"missing or damaged.*run visae index again"):
        thumbnail_bytes(tmp_path, "ab")
    path = thumbnail_path(tmp_path, "ab")
    path.parent.mkdir()
    path.write_bytes(b"no picture")
    with pytest.raises(FeatureIndexError, match="missing or damaged"):
        read_thumbnail(tmp_path, "ab")
