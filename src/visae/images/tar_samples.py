"""The samples of a WebDataset shard: files of one name and several extensions stand together.

A file ``cat/0001.seg.png`` belongs to the sample ``cat/0001`` and is its ``seg.png``: the key ends
at the first dot of the file's name, as in the package webdataset. Files without a dot and those
called ``__name__`` are metadata of the archive, not of a sample.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from visae.errors import ImageError
from visae.images.tar_index import TarMember

__all__ = ["TarSample", "group_samples"]

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


class TarSample(NamedTuple):
    """One sample: a key and its files by extension."""

    key: str
    """Path of its files inside the archive, up to the first dot of their names."""
    files: dict[str, TarMember]
    """Its files by extension, in lower case without the first dot."""


def group_samples(members: Sequence[TarMember], *, where: Path) -> list[TarSample]:
    """The samples of an archive, in order.

    Raises:
        ImageError: when a sample has two files of one extension, or its files are not together.
    """
    samples: dict[str, TarSample] = {}
    current = ""
    for member in members:
        named = _KEY_AND_EXTENSION.fullmatch(member.name)
        if named is None or _META.match(member.name):
            continue
        key, extension = named[1], named[2].lower()
        if key != current and key in samples:
            what = f"The files of sample {key} are not together"
            raise ImageError(what, where=where, fix="Make the tar file again, sorted by name")
        current, files = key, samples.setdefault(key, TarSample(key, {})).files
        if extension in files:
            what = f"Sample {key} has two files .{extension}"
            raise ImageError(what, where=where, fix="Remove one of them")
        files[extension] = member
    return list(samples.values())
