from pathlib import Path

import pytest

from visae.errors import ImageError
from visae.images.tar_index import TarMember
from visae.images.tar_samples import group_samples


def samples(*names):
    members = [TarMember(name, 512 * i, 1) for i, name in enumerate(names)]
    found = group_samples(members, where=Path("shard.tar"))
    return {sample.key: {ext: m.name for ext, m in sample.files.items()} for sample in found}


def test_files_are_grouped_by_the_name_before_the_first_dot():
    assert samples("a/1.jpg", "a/1.seg.png", "a/1.CLS", "b.c/1.jpg", "./2.jpg") == {
        "a/1": {"jpg": "a/1.jpg", "seg.png": "a/1.seg.png", "cls": "a/1.CLS"},
        "b.c/1": {"jpg": "b.c/1.jpg"},
        "./2": {"jpg": "./2.jpg"},
    }


@pytest.mark.parametrize("name", ["README", "a/README", "__meta__", "__x__/a.jpg", ".hidden"])
def test_what_belongs_to_no_sample_is_left_out(name):
    assert samples("1.jpg", name) == {"1": {"jpg": "1.jpg"}}


def test_an_extension_twice_is_refused():
    with pytest.raises(ImageError, match=r"Sample 1 has two files \.jpg"):
        samples("1.jpg", "1.JPG")


def test_a_sample_that_is_torn_apart_is_refused():
    with pytest.raises(ImageError, match="files of sample 1 are not together"):
        samples("1.jpg", "2.jpg", "1.cls")
