import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ImageError
from visae.images.shard_names import find_shards, fixed_folder


@pytest.fixture
def folder(tmp_path):
    for name in ("train/a-008.tar", "train/a-009.tar", "train/a-010.tar", "val/a-008.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(folder, pattern):
    found = find_shards(f"{folder}/{pattern}")
    assert all(path.is_absolute() for path in found)
    return [path.relative_to(folder).as_posix() for path in found]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train/a-008.tar", ["train/a-008.tar"]),
        ("train/a-{008..010}.tar", ["train/a-008.tar", "train/a-009.tar", "train/a-010.tar"]),
        ("{val,train}/a-008.tar", ["val/a-008.tar", "train/a-008.tar"]),
        ("{val,train}/*8.tar", ["val/a-008.tar", "train/a-008.tar"]),
        ("*/a-0{08,10}.tar", ["train/a-008.tar", "val/a-008.tar", "train/a-010.tar"]),
        ("**/a-00[89].tar", ["train/a-008.tar", "train/a-009.tar", "val/a-008.tar"]),
        ("{train,train}/a-010.tar", ["train/a-010.tar"]),
    ],
)
def test_patterns_name_files_in_a_fixed_order(folder, pattern, expected):
    assert names(folder, pattern) == expected


def test_a_name_with_braces_of_its_own_is_taken_as_it_stands(folder):
    (folder / "{0..3}.tar").touch()
    (folder / "[x].tar").touch()
    assert names(folder, "{0..3}.tar") == ["{0..3}.tar"]
    assert names(folder, "[x].tar") == ["[x].tar"]


def test_a_relative_pattern_starts_at_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_shards("val/*.tar") == [folder / "val/a-008.tar"]
    assert find_shards("val/a-008.tar") == [folder / "val/a-008.tar"]


@given(st.integers(0, 50), st.integers(0, 30), st.integers(1, 4))
def test_ranges_are_padded_as_their_first(first, more, width):
    pattern = f"/nowhere/{{{first:0{width}d}..{first + more}}}"
    with pytest.raises(ImageError) as caught:
        find_shards(pattern)
    assert caught.value.where == f"/nowhere/{first:0{width}d}"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("train/a-{008..011}.tar", r"no such tar file .*a-011.tar.* holds: a-010.tar"),
        ("train/b*.tar", r"No tar file fits .* holds: a-"),
        ("tarin/*.tar", "No tar file fits"),
        ("train/a-{010..008}.tar", "is no range of shards"),
        ("{1..9999999999}.tar", "is no range of shards"),
        ("{0..9999}{0..9999}.tar", r"no such tar file .*/00.tar"),
    ],
)
def test_what_names_nothing_is_refused(folder, pattern, what):
    with pytest.raises(ImageError, match=what) as caught:
        find_shards(f"{folder}/{pattern}")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train/a-008.tar", "train"),
        ("train/a-{008..010}.tar", "train"),
        ("{train,val}/a.tar", "."),
        ("train/missing.tar", "train"),
        ("*/deep/a.tar", "."),
    ],
)
def test_the_folder_of_a_pattern_has_no_wildcard(folder, pattern, expected):
    assert fixed_folder(f"{folder}/{pattern}") == folder / expected
