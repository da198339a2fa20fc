from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ImageError
from visae.images.location import (
    is_folder,
    is_there,
    join_options,
    nearest_siblings,
    replace_path,
    split_options,
)

values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
keys = st.text("abcdefghij_", min_size=1)


@given(address=st.text("abc/.: -", min_size=1), options=st.dictionaries(keys, values))
def test_joining_and_splitting_are_inverse(address, options):
    assert split_options(join_options(address, options)) == (address, options)


def test_options_are_what_follows_the_last_question_mark():
    assert split_options("a?b.csv?label=x%20y&root=c/d") == (
        "a?b.csv",
        {"label": "x y", "root": "c/d"},
    )


def test_options_of_none_are_left_out():
    assert join_options("a.csv", {"label": None, "root": "b"}) == "a.csv?root=b"


def test_a_file_whose_name_holds_a_question_mark_is_taken_as_it_stands(tmp_path):
    path = tmp_path / "what?label=x"
    path.touch()
    assert split_options(str(path)) == (str(path), {})


@pytest.mark.parametrize("options", ["", "label", "label=", "label=a&label=b", "a=b&", "&"])
def test_malformed_options_are_refused(options):
    with pytest.raises(ImageError, match="cannot be read"):
        split_options(f"labels.csv?{options}")


def test_nearest_siblings_look_where_the_path_breaks_off(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / ".hidden").touch()
    missing = tmp_path / "imags/train/cat"
    assert nearest_siblings(missing) == f"{tmp_path} holds: images"


def test_nearest_siblings_of_an_unreadable_folder_are_none(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert nearest_siblings(tmp_path / "x") == f"{tmp_path} holds: none"


def test_whatever_was_typed_is_there_or_not(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert is_there(tmp_path / "a.txt")
    assert not is_folder(tmp_path / "a.txt")
    assert is_folder(tmp_path)
    for name in ("gone", "x" * 5000, "nul\0", "a.txt/b", "loop"):
        assert not is_there(tmp_path / name)
        assert not is_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/a/b", "/A/B"),
        ("/a/b.csv?label=x&root=r", "/A/B.CSV?label=x&root=r"),
        ("seg:/a/b?ignore=1", "seg:/A/B?ignore=1"),
        ("wds:/a/{0..3}.tar", "wds:/A/{0..3}.TAR"),
        ("../a", "../A"),
        ("hf://owner/data:train?n=1", "hf://owner/data:train?n=1"),
        ("bundled:cifar10", "bundled:cifar10"),
        ("memory:frames", "memory:frames"),
    ],
)
def test_the_path_of_a_location_is_changed_alone(location, expected):
    assert replace_path(location, str.upper) == expected
