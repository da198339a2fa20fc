"""The table of images that were read, and the list of those that were not.

Recording writes both; every later stage finds labels, groups and sides here, row by row in the
order of the activation store. Main names: ``ImageTable``, ``Skipped``, ``write_skipped``.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from visae.errors import StoreError
from visae.images.source import ImageEntry
from visae.images.splits import Split, split_sides
from visae.storage.atomic import atomic_path, write_text

__all__ = ["ImageTable", "Skipped", "write_skipped"]

_KIND, _FORMAT = "images", 1
_HEADER = {"visae": json.dumps({"kind": _KIND, "format": _FORMAT})}
_FIELDS = (
    pa.field("content_id", pa.string(), nullable=False),
    pa.field("ref", pa.string(), nullable=False),
    pa.field("label", pa.string()),
    pa.field("group", pa.string()),
)
_MASK_FIELD = pa.field("mask_id", pa.string())
_METADATA_PREFIX = "metadata."
_REMAKE = "Restore it or record the images again"


class Skipped(NamedTuple):
    """One image that could not be read."""

    ref: str
    """How its source finds it."""
    reason: str
    """What was wrong with it, as one clause."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTable:
    """The images that were read, in order: row i is image i of the activation store."""

    content_ids: tuple[str, ...]
    """SHA-256 of each image's content; an image that was given twice appears twice."""
    refs: tuple[str, ...]
    """How the source finds each image."""
    labels: tuple[str | None, ...]
    """Class name of each image, None where it has none."""
    groups: tuple[str | None, ...]
    """What a split must keep whole, None where an image stands for itself."""
    mask_ids: tuple[str | None, ...] = ()
    """SHA-256 of each image's mask, None where it has none; empty where no image has one."""
    metadata: Mapping[str, tuple[str | None, ...]] = dataclasses.field(
        default_factory=dict, hash=False
    )
    """Whatever else the source said, one column a name."""

    def __post_init__(self) -> None:
        columns = [self.content_ids, self.refs, self.labels, self.groups, *self.metadata.values()]
        lengths = {len(column) for column in [*columns, self.mask_ids or self.content_ids]}
        if len(lengths) != 1:
            what = f"The columns of an image table have different lengths {sorted(lengths)}"
            raise StoreError(what, fix="Give one content id, ref, label and group for each image")

    @classmethod
    def of(cls, images: Iterable[tuple[ImageEntry, str, str | None]]) -> "ImageTable":
        """The table of images that were read: entry, content id and mask id (or None) of each.

        Metadata columns are those of any entry, in the order in which they first occur.
        """
        found = list(images)
        entries = [entry for entry, _, _ in found]
        mask_ids = tuple(mask_id for _, _, mask_id in found)
        names = dict.fromkeys(name for entry in entries for name in entry.metadata)
        return cls(
            content_ids=tuple(content_id for _, content_id, _ in found),
            refs=tuple(entry.ref for entry in entries),
            labels=tuple(entry.label for entry in entries),
            groups=tuple(entry.group for entry in entries),
            mask_ids=mask_ids if any(mask_ids) else (),
            metadata={name: tuple(e.metadata.get(name) for e in entries) for name in names},
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.content_ids)

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class name that occurs, sorted by code point."""
        return tuple(sorted({label for label in self.labels if label is not None}))

    def class_indices(self) -> Int64[np.ndarray, " image"]:
        """Position of each image's label in ``classes``, −1 for an image without label."""
        position: dict[str | None, int] = {name: i for i, name in enumerate(self.classes)}
        return np.array([position.get(label, -1) for label in self.labels], dtype=np.int64)

    def duplicates(self) -> dict[str, tuple[str, ...]]:
        """The refs of every content id that occurs more than once, in the order of the table."""
        refs: dict[str, list[str]] = {}
        for content_id, ref in zip(self.content_ids, self.refs, strict=True):
            refs.setdefault(content_id, []).append(ref)
        return {key: tuple(found) for key, found in refs.items() if len(found) > 1}

    def sides(self, *, confirmation_share: float = 0.5, salt: str = "visae") -> list[Split]:
        """Discovery or confirmation for each image; see ``split_sides``.

        Raises:
            ConfigError: when the share is not between 0 and 1, or when equal images belong to
                groups of different sides.
        """
        return split_sides(
            self.content_ids, self.groups, confirmation_share=confirmation_share, salt=salt
        )

    def take(self, rows: Sequence[int]) -> "ImageTable":
        """Some rows, in the order given."""

        def chosen(column: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(column[row] for row in rows)

        return ImageTable(
            content_ids=chosen(self.content_ids),
            refs=chosen(self.refs),
            labels=chosen(self.labels),
            groups=chosen(self.groups),
            mask_ids=chosen(self.mask_ids) if self.mask_ids else (),
            metadata={name: chosen(column) for name, column in self.metadata.items()},
        )

    def entry(self, row: int) -> ImageEntry:
        """What the source said of one image."""
        return ImageEntry(
            ref=self.refs[row],
            label=self.labels[row],
            group=self.groups[row],
            metadata={name: column[row] for name, column in self.metadata.items()},
        )

    def write(self, path: Path) -> None:
        """Write the table as Parquet, atomically.

        Raises:
            StoreError: when the disk is full, read-only or not permitted.
        """
        fields, columns = list(_FIELDS), [self.content_ids, self.refs, self.labels, self.groups]
        if self.mask_ids:
            fields, columns = [*fields, _MASK_FIELD], [*columns, self.mask_ids]
        for name, column in self.metadata.items():
            fields.append(pa.field(_METADATA_PREFIX + name, pa.string()))
            columns.append(column)
        arrays = [pa.array(column, pa.string()) for column in columns]
        table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=_HEADER))
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    @classmethod
    def read(cls, path: Path) -> "ImageTable":
        """Read a table, verifying its checksums.

        Raises:
            StoreError: when the file is missing, damaged, of a newer format or another table.
        """
        table = _read_parquet(path)
        _check_schema(table.schema, path)
        columns = {name: tuple(table.column(name).to_pylist()) for name in table.column_names}
        return cls(
            content_ids=columns["content_id"],
            refs=columns["ref"],
            labels=columns["label"],
            groups=columns["group"],
            mask_ids=columns.get("mask_id", ()),
            metadata={
                name.removeprefix(_METADATA_PREFIX): column
                for name, column in columns.items()
                if name.startswith(_METADATA_PREFIX)
            },
        )


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write the images that could not be read as CSV with a header, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Skipped._fields, *skipped])
    write_text(path, text.getvalue())


def _read_parquet(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except FileNotFoundError as failure:
        what = "There is no such image table"
        raise StoreError(what, where=path, fix=_REMAKE) from failure
    except (OSError, pa.ArrowException) as failure:
        what = "This image table is not whole Parquet"
        fix = f"It was altered or cut short: {_REMAKE[0].lower()}{_REMAKE[1:]}"
        raise StoreError(what, where=path, fix=fix) from failure


def _check_schema(schema: pa.Schema, path: Path) -> None:
    header = _header(schema)
    is_newer = isinstance(header.get("format"), int) and header["format"] > _FORMAT
    if header.get("kind") == _KIND and is_newer:
        what = f"Format {header['format']} is newer than format {_FORMAT}, the newest this reads"
        raise StoreError(what, where=path, fix="Upgrade visae")
    if header != {"kind": _KIND, "format": _FORMAT} or not _is_table(schema):
        fix = "Give images.parquet of a visae store"
        raise StoreError("This is not visae's table of images", where=path, fix=fix)


def _is_table(schema: pa.Schema) -> bool:
    """Whether the columns are the four of every table, then the optional ones."""
    n_fixed = len(_FIELDS)
    fields = list(schema)
    optional = fields[n_fixed:]
    described = optional[1:] if optional[:1] == [_MASK_FIELD] else optional
    return fields[:n_fixed] == list(_FIELDS) and all(
        field.name.startswith(_METADATA_PREFIX) and pa.types.is_string(field.type)
        for field in described
    )


def _header(schema: pa.Schema) -> Mapping[str, Any]:
    try:
        header = json.loads((schema.metadata or {}).get(b"visae", b"{}"))
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}
