"""Where the files in a tar archive lie, so that any one is read without the others.

The archive is walked once over its headers. Nothing is ever extracted: names inside are only names,
whatever path they spell. Main names: ``TarMember``, ``index_tar``, ``read_member``.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from visae.errors import ImageError

__all__ = ["TarMember", "index_tar", "read_member"]

_MAX_FILE_BYTES = 2**30
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_END = b"\0" * tarfile.BLOCKSIZE
_RESTORE = "Restore it or leave it out of the pattern"


class TarMember(NamedTuple):
    """One file in an archive."""

    name: str
    """What it is called inside."""
    offset: int
    """Where its bytes start in the archive."""
    n_bytes: int
    """How many they are."""


def index_tar(path: Path) -> list[TarMember]:
    """Every regular file in an archive, in order; folders and links are left out.

    Costs one read of 512 bytes a file in it.

    Raises:
        ImageError: when the archive is missing, compressed, no tar, damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            _refuse_compressed(file.read(6), path)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members = list(_members(archive, path))
                _check_end(file.fileno(), archive.offset, path)
    except tarfile.TarError as failure:
        raise _damaged(path, str(failure)) from failure
    except FileNotFoundError as failure:
        raise ImageError("There is no such tar file", where=path, fix=_RESTORE) from failure
    except OSError as failure:
        reason = (failure.strerror or "unknown reason").lower()
        what = f"This tar file cannot be opened: {reason}"
        raise ImageError(what, where=path, fix="Check the path and its permissions") from failure
    return members


def read_member(path: Path, member: TarMember, *, where: str) -> bytes:
    """The bytes of one file in an archive; threads and forked processes share nothing.

    Raises:
        ImageError: when the archive cannot be read or ends too early, or the file is larger than
            1 GiB.
    """
    if member.n_bytes > _MAX_FILE_BYTES:
        fix = "Replace or remove this image"
        raise ImageError("The file is larger than 1 GiB", where=where, fix=fix)
    try:
        with path.open("rb", buffering=0) as file:
            data = _read_at(file.fileno(), member)
    except OSError as failure:
        what = "The tar file of this image cannot be opened"
        raise ImageError(what, where=where, fix=f"Check {path}") from failure
    if len(data) < member.n_bytes:
        what = "The tar file of this image ends too early"
        raise ImageError(what, where=where, fix=f"Restore {path}")
    return data


def _read_at(descriptor: int, member: TarMember) -> bytes:
    """As many of a member's bytes as there are; one call may give fewer than asked for."""
    parts, n_read = [], 0
    while n_read < member.n_bytes:
        part = os.pread(descriptor, member.n_bytes - n_read, member.offset + n_read)
        if not part:
            break
        parts.append(part)
        n_read += len(part)
    return b"".join(parts)


def _refuse_compressed(start: bytes, path: Path) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            what = f"This tar file is compressed ({name}), so no image in it can be read by itself"
            raise ImageError(what, where=path, fix="Decompress it, and give the .tar file")


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[TarMember]:
    for info in archive:
        if info.issparse():
            what = f"The file {info.name} is stored with holes"
            raise ImageError(what, where=path, fix="Make the tar file again without --sparse")
        if info.isreg():
            yield TarMember(info.name, info.offset_data, info.size)


def _check_end(descriptor: int, offset: int, path: Path) -> None:
    """Tell the end of an archive from damage, at which ``tarfile`` stops without a word."""
    block = os.pread(descriptor, tarfile.BLOCKSIZE, offset)
    if len(block) < tarfile.BLOCKSIZE:
        raise _damaged(path, "it ends without the mark of its end")
    if block != _END:
        raise _damaged(path, f"its header at byte {offset} cannot be read")


def _damaged(path: Path, reason: str) -> ImageError:
    what = f"This is no tar file, or it is damaged or cut short: {reason}"
    return ImageError(what, where=path, fix=_RESTORE)
