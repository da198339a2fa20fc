"""Write a file so that it is either whole under its final name or not there at all.

Every file visae writes goes through ``atomic_path``: written under a temporary name in the same
folder, flushed to disk, then renamed. ``kill -9`` or a full disk leaves the old file, or none.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from visae.errors import StoreError

__all__ = ["atomic_folder", "atomic_path", "disk_errors", "write_bytes", "write_text"]

_DISK_REMEDIES = {
    errno.ENOSPC: "Free space or choose another --out; running the same command again resumes",
    errno.EDQUOT: "Your quota is used up: free space or choose another --out, then run it again",
    errno.EACCES: "Check the permissions of the folder or choose another --out",
    errno.EPERM: "Check the permissions of the folder or choose another --out",
    errno.EROFS: "The file system is read-only: choose another --out",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another --out",
    errno.EEXIST: "A file stands where a folder is needed: choose another --out",
    errno.EISDIR: "A folder stands where a file is needed: choose another --out",
}


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
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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

    An existing folder at ``path`` is replaced as a whole; a failed block leaves it untouched.
    """
    import shutil

    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            if path.is_dir():
                old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically as UTF-8."""
    write_bytes(path, text.encode())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
