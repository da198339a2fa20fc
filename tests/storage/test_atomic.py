"""Atomic writes: whole or absent, whatever happens in the middle."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from visae.errors import StoreError
from visae.storage import atomic
from visae.storage.atomic import (
    atomic_folder,
    atomic_path,
    disk_errors,
    leftovers,
    remove_leftovers,
    write_bytes,
    write_text,
)

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from visae.storage.atomic import {block}

with {block}(Path(sys.argv[1])) as temporary:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITE_FILE = "temporary.write_bytes(b'new, but only half of i')"
WRITE_INNER = "(temporary / 'a.json').write_bytes(b'new')"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_until_killed(block: str, write: str, path: Path) -> None:
    script = KILLED_WRITER.format(block=block, write=write)
    finished = subprocess.run([sys.executable, "-c", script, path], check=False, timeout=60)
    assert finished.returncode == -signal.SIGKILL


def test_a_write_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "workspace" / "saes" / "note.txt"
    write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    assert names(path.parent) == ["note.txt"]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old and longer")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_file_keeps_its_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent, "a rename is atomic within one file system only"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_keeps_the_old_file_and_no_temporary_one(tmp_path, stop):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(stop), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise stop
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    path, flushed = tmp_path / "a.bin", []
    monkeypatch.setattr(
        atomic, "_flush", lambda target: flushed.append((target.is_dir(), path.exists()))
    )
    write_bytes(path, b"new")
    assert flushed == [(False, False), (True, True)]


def test_kill_leaves_the_old_file_and_leftovers_can_be_removed(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    run_until_killed("atomic_path", WRITE_FILE, path)
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    assert [path.suffix for path in leftovers(tmp_path)] == [".tmp"]
    assert remove_leftovers(tmp_path) == len(b"new, but only half of i")
    assert leftovers(tmp_path) == []
    assert names(tmp_path) == ["a.bin"]


def test_kill_before_the_first_write_leaves_no_file(tmp_path):
    path = tmp_path / "a.bin"
    run_until_killed("atomic_path", WRITE_FILE, path)
    assert not path.exists()


def test_kill_leaves_the_old_folder(tmp_path):
    path = tmp_path / "report"
    path.mkdir()
    (path / "a.json").write_bytes(b"old")
    run_until_killed("atomic_folder", WRITE_INNER, path)
    assert (path / "a.json").read_bytes() == b"old"
    assert remove_leftovers(tmp_path) == 3
    assert names(tmp_path) == ["report"]


def test_leftovers_are_only_what_atomic_writes_leave(tmp_path):
    kept = [".lock", ".hidden.tmp", "a.12345678.tmp", ".a.1234567.tmp", ".a.12345678.bin"]
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "residual@9").mkdir()
    (tmp_path / "residual@9" / ".00000.safetensors.0123abcd.tmp").write_bytes(b"12345")
    assert remove_leftovers(tmp_path) == 5
    assert names(tmp_path) == sorted([*kept, "residual@9"])
    assert names(tmp_path / "residual@9") == []


def test_a_folder_between_its_two_renames_gets_its_name_back(tmp_path):
    moved, replaced = tmp_path / ".moved.0123abcd.old", tmp_path / ".replaced.0123abcd.old"
    for folder in (moved, replaced, tmp_path / "replaced"):
        folder.mkdir()
        (folder / "a.json").write_text(folder.name)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["moved", "replaced"]
    assert (tmp_path / "moved" / "a.json").read_text() == ".moved.0123abcd.old"
    assert (tmp_path / "replaced" / "a.json").read_text() == "replaced"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report"
    for name in ("old.html", "new.html"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert names(path) == ["new.html"]
    assert names(tmp_path) == ["report"]


def test_a_failed_block_keeps_the_old_folder(tmp_path):
    path = tmp_path / "report"
    with atomic_folder(path) as temporary:
        (temporary / "old.html").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:  # noqa: PT012
        (temporary / "new.html").write_text("new")
        raise RuntimeError
    assert names(path) == ["old.html"]
    assert names(tmp_path) == ["report"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report"
    path.mkdir()
    (path / "old.html").write_text("old")
    rename = Path.replace

    def refuse_the_new(source, target):
        if source.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, "no space")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new)
    with pytest.raises(StoreError, match="no space left"), atomic_folder(path) as temporary:
        (temporary / "new.html").write_text("new")
    assert names(path) == ["old.html"]
    assert names(tmp_path) == ["report"]


def test_every_file_of_a_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(atomic, "_flush", lambda target: flushed.append(target.name))
    with atomic_folder(tmp_path / "report") as temporary:
        (temporary / "images").mkdir()
        (temporary / "images" / "a.png").write_bytes(b"a")
    assert {"images", "a.png"} <= set(flushed)


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        write_bytes(path, b"new")
    assert str(caught.value) == (
        f"Cannot write: no space left on device ({path}). "
        "Free space or choose another --out; running the same command again resumes."
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["shard.safetensors"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    write_bytes(small_disk / "a.bin", b"old")
    with pytest.raises(StoreError, match="Free space"):
        write_bytes(small_disk / "a.bin", bytes(200_000))
    assert (small_disk / "a.bin").read_bytes() == b"old"
    assert names(small_disk) == ["a.bin"]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "fault"),
    ],
)
def test_each_disk_error_has_its_remedy(code, remedy):
    with pytest.raises(StoreError, match=remedy), disk_errors(Path("out")):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_unchanged():
    with pytest.raises(FileNotFoundError), disk_errors(Path("out")):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(OSError, match="no number"), disk_errors(Path("out")):
        raise OSError("no number")


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "saes").write_bytes(b"")
    with pytest.raises(StoreError, match="A file stands where a folder is needed"):
        write_bytes(tmp_path / "saes" / "a.bin", b"new")
    with (
        pytest.raises(StoreError, match="A file stands where a folder is needed"),
        atomic_folder(tmp_path / "saes"),
    ):
        pass
    assert names(tmp_path) == ["saes"]


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(StoreError, match="A folder stands where a file is needed"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(StoreError, match="shorter name"):
        write_bytes(tmp_path / ("a" * 300), b"new")
