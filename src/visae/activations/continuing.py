"""Whether an interrupted recording may go on: its finished shards are of these very images.

A shard says which rows of the source it covers, so a list that has changed since (rows added,
removed, sorted or labelled anew) would leave some images out and take others twice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from visae.activations.format import ShardRecord
from visae.errors import StoreError
from visae.images.source import ImageEntry, ImageSource, StreamedSource
from visae.storage.hashing import hash_json

__all__ = ["hash_of_images", "require_same_images"]


class _Row(NamedTuple):
    """What was known of an image when it was recorded."""

    ref: str
    label: str | None
    group: str | None
    metadata: Mapping[str, str | None]


def require_same_images(shard: ShardRecord, listed: ImageSource, rows: slice, path: Path) -> None:
    """Refuse a shard, whose file is ``path``, of other images than those listed in its rows now.

    Of a stream, which learns labels as it is read, only the refs are compared.

    Raises:
        StoreError: naming the first image that differs.
    """
    is_stream = isinstance(listed, StreamedSource) and listed.is_stream
    recorded, skipped = _rows(shard), {ref for ref, _ in shard.skipped}
    position = 0
    for entry in listed.entries[rows]:
        if position < len(recorded) and recorded[position].ref == entry.ref:
            if not is_stream:
                _require_same_words(recorded[position], entry, path)
            position += 1
        elif entry.ref not in skipped:
            raise _changed(f"where image {entry.ref} is listed now, another was recorded", path)
    if position < len(recorded):
        raise _changed(f"image {recorded[position].ref} is listed no more", path)


def hash_of_images(entries: Sequence[ImageEntry]) -> str:
    """Hash of what a source says of its images, equal where it says the same."""
    return hash_json([[e.ref, e.label, e.group, dict(e.metadata)] for e in entries])


def _rows(shard: ShardRecord) -> list[_Row]:
    names, columns = list(shard.metadata), zip(*shard.metadata.values(), strict=True)
    metadata = [dict(zip(names, row, strict=True)) for row in columns]
    known = zip(shard.refs, shard.labels, shard.groups, strict=True)
    return [_Row(*row, metadata[i] if metadata else {}) for i, row in enumerate(known)]


def _require_same_words(recorded: _Row, entry: ImageEntry, path: Path) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        "label": (recorded.label, entry.label),
        "group": (recorded.group, entry.group),
    }
    for name in {**recorded.metadata, **entry.metadata}:
        pairs[name] = recorded.metadata.get(name), entry.metadata.get(name)
    for name, (before, now) in pairs.items():
        if before != now:
            raise _changed(
                f"the {name} of image {entry.ref} was {before!r} and is {now!r} now", path
            )


def _changed(how: str, path: Path) -> StoreError:
    return StoreError(
        f"The list of images has changed since this shard was recorded: {how}",
        where=path,
        fix="Restore the list, or choose another --out and record anew",
    )
