import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ImageError
from visae.images.tar_index import TarMember, index_tar, read_member

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def archive(files, kind=tarfile.PAX_FORMAT):
    """The bytes of a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def write(tmp_path):
    def write_bytes(data):
        path = tmp_path / "shard.tar"
        path.write_bytes(data)
        return path

    return write_bytes


def refused(path, what):
    with pytest.raises(ImageError, match=what) as caught:
        index_tar(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=90)
contents = st.lists(st.tuples(names, st.binary(max_size=2000)), max_size=5)


@given(contents, st.sampled_from(FORMATS))
def test_every_file_is_read_where_it_lies(tmp_path_factory, files, kind):
    path = tmp_path_factory.mktemp("tar") / "shard.tar"
    path.write_bytes(archive(files, kind))
    members = index_tar(path)
    assert [(m.name, read_member(path, m, where="it")) for m in members] == files


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_long_names_and_other_alphabets_are_whole(write, kind):
    name = "é" * 80 + "/" + "日本" * 60 + ".jpg"
    (member,) = index_tar(write(archive([(name, b"x")], kind)))
    assert member.name == name


def test_folders_and_links_are_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"a")
    (tmp_path / "in/b.jpg").symlink_to("/etc/hostname")
    (tmp_path / "in/c.jpg").hardlink_to(tmp_path / "in/a.jpg")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    assert len(index_tar(tmp_path / "shard.tar")) == 1


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../../up.jpg", "~/.ssh/key.jpg"])
def test_nothing_is_extracted_whatever_path_a_name_spells(write, tmp_path, name):
    path = write(archive([(name, b"data")]))
    before = sorted(tmp_path.parent.rglob("*"))
    (member,) = index_tar(path)
    assert read_member(path, member, where=name) == b"data"
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("compress", "name"), [(gzip.compress, "gzip"), (lzma.compress, "xz")], ids=["gzip", "xz"]
)
def test_compressed_archives_are_refused_with_the_reason(write, compress, name):
    refused(write(compress(archive([("a.jpg", b"a")]))), f"compressed \\({name}\\)")


FILES = [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 700), ("c.jpg", b"c" * 700)]


def test_an_archive_cut_anywhere_is_refused(write):
    whole = archive(FILES)
    end = 3 * (512 + 1024)
    for length in [*range(0, end, 97), 512, 1536, end - 1, end]:
        refused(write(whole[:length]), "damaged or cut short")
    refused(write(whole[:end]), "ends without the mark of its end")
    assert len(index_tar(write(whole[: end + 512]))) == 3


@pytest.mark.parametrize("header", [0, 1536, 3072])
def test_a_damaged_header_is_refused_not_taken_for_the_end(write, header):
    data = bytearray(archive(FILES))
    data[header + 3] ^= 0xFF
    refused(write(bytes(data)), "damaged or cut short")


def test_a_file_with_holes_is_refused(write):
    data = bytearray(archive([("a.jpg", b"a")], tarfile.GNU_FORMAT))
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    refused(write(bytes(data)), "stored with holes")


def test_no_archive_is_refused(tmp_path, write):
    refused(tmp_path / "none.tar", "no such tar file")
    (tmp_path / "folder.tar").mkdir()
    refused(tmp_path / "folder.tar", "cannot be opened: is a directory")
    refused(write(b"no tar file" * 100), "damaged or cut short")


def test_an_archive_that_shrank_or_vanished_fails_file_by_file(write):
    path = write(archive(FILES))
    members = index_tar(path)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(ImageError, match="ends too early"):
        read_member(path, members[0], where="a")
    path.unlink()
    with pytest.raises(ImageError, match=r"cannot be opened \(b\)"):
        read_member(path, members[1], where="b")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    member = TarMember("a.jpg", 512, 2**30 + 1)
    with pytest.raises(ImageError, match="larger than 1 GiB"):
        read_member(tmp_path / "none.tar", member, where="a")
