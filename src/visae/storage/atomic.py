"""Write a file so that it is either whole under its final name or not there at all.

Every file visae writes goes through ``atomic_path``: written under a temporary name in the same
folder, flushed to disk, then renamed. ``kill -9`` or a full disk leaves the old file, or none;
what a killed process left under temporary names is cleared by ``remove_leftovers``.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from visae.errors import StoreError

__all__ = [
    "atomic_folder",
    "atomic_path",
    "disk_errors",
    "leftovers",
    "remove_leftovers",
    "write_bytes",
    "write_text",
]

_DISK_REMEDIES = {
    errno.ENOSPC: "Free space or choose another --out; running the same command again resumes",
    errno.EDQUOT: "Your quota is used up: free space or choose another --out, then run it again",
    errno.EACCES: "Check the permissions of the folder or choose another --out",
    errno.EPERM: "Check the permissions of the folder or choose another --out",
    errno.EROFS: "The file system is read-only: choose another --out",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another --out",
    errno.EEXIST: "A file stands where a folder is needed: choose another --out",
    errno.EISDIR: "A folder stands where a file is needed: choose another --out",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EFBIG: "The file system takes no file of this size: choose another --out",
    errno.EIO: "The disk reports a fault: choose another --out",
}

_TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<ending>tmp|old)")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or missing permissions into a ``StoreError`` with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _DISK_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        reason = os.strerror(error.errno or 0).lower()
        raise StoreError(f"Cannot write: {reason}", where=path, fix=remedy) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well.

    Raises:
        StoreError: when the disk is full, read-only or not permitted; nothing is left behind.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends well.

    An existing folder at ``path`` is replaced as a whole; a failed block leaves it untouched. (To
    replace takes two renames: ``kill -9`` between them leaves the old folder under a hidden name.)

    Raises:
        StoreError: when the disk is full, read-only or not permitted; nothing is left behind.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for inner in (*temporary.rglob("*"), temporary):
                _flush(inner)
            _replace_folder(temporary, path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Files and folders under temporary names below a folder: of a killed writer, or a live one."""
    return [path for path in folder.rglob(".*") if _TEMPORARY_NAME.fullmatch(path.name)]


def remove_leftovers(folder: Path) -> int:
    """Clear what killed processes left below a folder, and give the number of bytes freed.

    An old folder whose replacement never arrived gets its name back. Only for the one process
    that writes there, under ``visae.storage.locks.exclusive``: the temporary files of another
    live writer look the same.
    """
    n_bytes = 0
    with disk_errors(folder):
        for path in leftovers(folder):
            match = _TEMPORARY_NAME.fullmatch(path.name)
            if match and match["ending"] == "old" and not path.with_name(match["name"]).exists():
                path.replace(path.with_name(match["name"]))
            elif match:
                n_bytes += _delete(path)
    return n_bytes


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    write_bytes(path, text.encode())


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        temporary.replace(path)
        return
    old = _beside(path, "old")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old)


def _delete(path: Path) -> int:
    """Delete a file or folder, and give the number of bytes it had."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    n_bytes = sum(file.stat().st_size for file in files)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return n_bytes


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
