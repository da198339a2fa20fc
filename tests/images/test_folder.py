import os

import pytest

from visae.errors import ImageError
from visae.images.folder import IMAGE_SUFFIXES, FolderImages
from visae.images.source import ImageEntry, ImageSource
from visae.storage.hashing import hash_file


def refs(root):
    return [entry.ref for entry in FolderImages(root).entries]


def test_class_folders_give_labels_and_images_beside_them_have_none(tmp_path, write_image):
    for ref in ("owl/a.png", "cat/x/y/deep.png", "cat/b.png", "beside.png"):
        write_image(tmp_path / ref)
    assert FolderImages(tmp_path).entries == (
        ImageEntry(ref="beside.png", label=None),
        ImageEntry(ref="cat/b.png", label="cat"),
        ImageEntry(ref="cat/x/y/deep.png", label="cat"),
        ImageEntry(ref="owl/a.png", label="owl"),
    )


def test_a_flat_folder_has_no_labels(tmp_path, write_image):
    write_image(tmp_path / "a.png")
    (entry,) = FolderImages(tmp_path).entries
    assert entry == ImageEntry(ref="a.png", label=None, group=None)


def test_order_is_by_code_point_of_the_whole_path(tmp_path, write_image):
    for ref in ("b.png", "B.png", "a10.png", "a9.png", "a/z.png", "a-1/z.png", "é.png"):
        write_image(tmp_path / ref)
    expected = ["B.png", "a-1/z.png", "a/z.png", "a10.png", "a9.png", "b.png", "é.png"]
    assert refs(tmp_path) == expected


def test_every_suffix_counts_in_any_case_and_nothing_else(tmp_path):
    names = [f"a{suffix}" for suffix in IMAGE_SUFFIXES] + [f"b{s.upper()}" for s in IMAGE_SUFFIXES]
    for name in [*names, "c.txt", "d.npy", "e.jpg.part", "png"]:
        (tmp_path / name).touch()
    assert refs(tmp_path) == sorted(names)


def test_hidden_files_and_folders_are_left_out(tmp_path, write_image):
    for ref in ("a.png", ".b.png", ".cache/c.png", "__MACOSX/._d.png"):
        write_image(tmp_path / ref)
    assert refs(tmp_path) == ["a.png"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path, write_image):
    write_image(tmp_path / "elsewhere/a.png")
    root = tmp_path / "root"
    write_image(root / "cat/b.png")
    (root / "owl").symlink_to(tmp_path / "elsewhere")
    (root / "cat/up").symlink_to(root)
    (root / "cat/here").symlink_to(".")
    (root / "self").symlink_to("self")
    assert refs(root) == ["cat/b.png", "owl/a.png"]


def test_a_dangling_link_is_listed_and_fails_when_loaded(tmp_path, write_image):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    source = FolderImages(tmp_path)
    assert [entry.ref for entry in source.entries] == ["a.png", "b.png"]
    with pytest.raises(ImageError, match="missing"):
        source.load("b.png")


def test_load_gives_pixels_and_the_hash_of_the_file(tmp_path, write_image):
    path = write_image(tmp_path / "cat/a.png")
    source = FolderImages(tmp_path)
    image = source.load("cat/a.png")
    assert image.content_id == hash_file(path)
    assert (image.pixels.mode, image.pixels.size) == ("RGB", (4, 3))


@pytest.mark.parametrize(
    "ref", ["../secret.png", "a/../../secret.png", "/etc/secret.png", "", ".", "b.png", "a\0.png"]
)
def test_a_ref_that_leaves_the_folder_or_was_not_listed_is_refused(tmp_path, write_image, ref):
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "root/a/a.png")
    with pytest.raises(ImageError, match="No image of this name"):
        FolderImages(tmp_path / "root").load(ref)


def test_it_is_a_source_that_opens_again_from_its_location(tmp_path, write_image, monkeypatch):
    write_image(tmp_path / "images/a.png")
    monkeypatch.chdir(tmp_path)
    source = FolderImages(tmp_path.relative_to(tmp_path) / "images")
    assert isinstance(source, ImageSource)
    assert source.location == (tmp_path / "images").as_posix()


def test_a_missing_folder_names_what_is_there(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match=r"no such folder, .*imges.*holds: images"):
        FolderImages(tmp_path / "imges/train")


def test_a_file_where_a_folder_should_be(tmp_path, write_image):
    with pytest.raises(ImageError, match="This is a file, not a folder"):
        FolderImages(write_image(tmp_path / "a.png"))


@pytest.mark.parametrize(("n_others", "words"), [(0, "0 other files"), (1, "1 other file ")])
def test_a_folder_without_images_says_what_it_looked_for(tmp_path, n_others, words):
    for i in range(n_others):
        (tmp_path / f"{i}.npy").touch()
    with pytest.raises(ImageError) as caught:
        FolderImages(tmp_path)
    assert words in str(caught.value)
    assert ".jpg, .jpeg, .png" in caught.value.fix


def test_an_unreadable_folder_is_an_error_not_a_silent_gap(tmp_path, write_image, monkeypatch):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "locked/b.png")
    scandir = os.scandir

    def refuse(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ImageError, match=r"cannot be opened: permission denied .*locked"):
        FolderImages(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system holds no such name")
    with pytest.raises(ImageError, match=r"'caf\\udce9.png' is not valid UTF-8"):
        FolderImages(tmp_path)
