"""A CSV or Parquet table of image paths, labels, groups, masks and anything else as a source."""

import csv
import dataclasses
import itertools
import math
import posixpath
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, final

import pyarrow as pa
import pyarrow.parquet as pq

from visae.errors import ImageError, nearest_names
from visae.images.decode import read_file, read_image
from visae.images.groups import column_names, join_groups
from visae.images.location import is_folder, is_there, join_options, nearest_siblings
from visae.images.masks import ImagePair, MaskOptions
from visae.images.source import ImageEntry, LoadedImage

__all__ = ["MANIFEST_SUFFIXES", "ManifestImages", "ManifestOptions"]

MANIFEST_SUFFIXES = (".csv", ".parquet")
_PATH_NAMES = ("path", "file", "image")
_LABEL_NAMES = ("label", "class")
_GROUP_NAMES = ("group",)
_N_PATHS_TRIED = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifestOptions(MaskOptions):
    """How to read a manifest's columns; the options of ``labels.csv?label=name``."""

    root: str | None = None
    """Folder that paths are relative to, itself relative to the manifest's folder."""
    path: str | None = None
    """Column of paths; unset: the first of path, file and image that is there."""
    label: str | None = None
    """Column of class names; unset: label or class, or no labels where neither is there."""
    group: str | None = None
    """Columns of groups that a split keeps whole, joined by commas; unset: group, if there."""
    mask: str | None = None
    """Column of paths of masks, which start where the images' do; unset: no masks."""


class _Columns(NamedTuple):
    """Names of the columns that have a meaning."""

    path: str
    label: str | None
    groups: tuple[str, ...]
    mask: str | None

    def described(self, known: Sequence[str]) -> list[str]:
        """The columns that are metadata: all others, and groups that were joined out of several."""
        used = {self.path, self.label, self.mask}
        used.update(self.groups if len(self.groups) == 1 else ())
        return [name for name in known if name not in used]


@final
class ManifestImages:
    """The images that a table names, in the order of its rows.

    Empty cells of the label and group columns mean none. A row whose file is missing is listed and
    fails when loaded. A column called ``name`` is never taken for the label by itself, because it
    may as well name the file or the patient: ask for it with ``?label=name``. Columns without a
    meaning are metadata, as text; those of a Parquet table that hold more than one value a row are
    left out. Images that share a value in any of several group columns make one group.

    Args:
        path: A .csv (UTF-8, comma-separated, with a header) or .parquet file.
        options: Which columns to use and where the paths start.

    Raises:
        ImageError: when the table cannot be read, lacks a column, has no rows, repeats a path, or
            when none of its first 100 paths leads to a file.
    """

    def __init__(self, path: Path, options: ManifestOptions | None = None) -> None:
        self._path = path.absolute()
        self._options = options or ManifestOptions()
        self._root = _root_of(self._path, self._options)
        table = _read_table(self._path)
        columns = _choose_columns(table, self._options, self._path)
        self._entries = _list_entries(table, columns, self._path)
        masks = _cells(table, columns.mask, self._path)
        self._mask_of = dict(zip((entry.ref for entry in self._entries), masks, strict=True))
        _check_reachable(self._path, self._root, [entry.ref for entry in self._entries])

    @property
    def location(self) -> str:
        """The absolute path of the manifest, with its options."""
        return join_options(self._path.as_posix(), dataclasses.asdict(self._options))

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Every image, in the order of the rows."""
        return self._entries

    @property
    def folder(self) -> Path:
        """The absolute path of the folder that the manifest lies in."""
        return self._path.parent

    def load(self, ref: str) -> LoadedImage:
        """Read one of the listed images.

        Raises:
            ImageError: when the manifest does not list the ref or the image cannot be read.
        """
        return read_image(self._listed(ref), where=ref)

    def pair(self, ref: str) -> ImagePair:
        """The bytes of a listed image and of its mask, None where its cell is empty.

        Raises:
            ImageError: as ``load``, or when the mask cannot be read.
        """
        data, mask = read_file(self._listed(ref), where=ref), self._mask_of[ref]
        if mask is None:
            return ImagePair(data, None)
        return ImagePair(data, read_file(self._root / mask, where=f"mask of {ref}"))

    def _listed(self, ref: str) -> Path:
        if ref not in self._mask_of:
            what = f"{self._path} does not list this image"
            raise ImageError(what, where=ref, fix="Use a ref that `entries` lists")
        return self._root / ref


def _root_of(path: Path, options: ManifestOptions) -> Path:
    root = path.parent / (options.root or "")
    if options.root is not None and not is_folder(root):
        fix = f"Correct ?root=; {nearest_siblings(root)}"
        raise ImageError("The root of this manifest is no folder", where=root, fix=fix)
    return root


def _read_table(path: Path) -> pa.Table:
    """The manifest as a table with at least one row."""
    if not is_there(path):
        fix = f"Check the path; {nearest_siblings(path)}"
        raise ImageError("There is no such manifest", where=path, fix=fix)
    try:
        table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as failure:
        what, fix = _read_failure(failure)
        raise ImageError(what, where=path, fix=fix) from failure
    if table.num_rows == 0:
        fix = "Add a row for each image"
        raise ImageError("This manifest has no rows", where=path, fix=fix)
    return table


def _read_failure(failure: Exception) -> tuple[str, str]:
    """What and fix for a manifest that could not be read."""
    match failure:
        case UnicodeDecodeError():
            return f"This manifest is not UTF-8 text: {failure.reason}", "Save it as UTF-8"
        case csv.Error():
            return f"This manifest is not valid CSV: {failure}", "Correct the quotes"
        case OSError(strerror=str(reason)):
            return f"This manifest cannot be opened: {reason.lower()}", "Check the path"
        case _:
            what = "This manifest is not valid Parquet"
            return what, "It was altered or cut short: make it again or restore it"


def _read_parquet(path: Path) -> pa.Table:
    with path.open("rb") as file:  # Python's own errors name the reason
        return pq.ParquetFile(file).read()


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) != len(header):
            what = f"The header {', '.join(header)} names a column twice"
            raise ImageError(what, where=path, fix="Rename one of them")
        rows = []
        for row in filter(None, reader):
            if len(row) != len(header):
                what = f"Line {reader.line_num} has {len(row)} cells, the header {len(header)}"
                fix = "Correct the line; put quotes around a cell that holds a comma"
                raise ImageError(what, where=path, fix=fix)
            rows.append(row)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.table(
        {name: pa.array(cells, pa.string()) for name, cells in zip(header, columns, strict=True)}
    )


def _choose_columns(table: pa.Table, options: ManifestOptions, where: Path) -> _Columns:
    path = _choose(table, options.path, _PATH_NAMES, where)
    if path is None:
        what = f"This manifest has no column {', '.join(_PATH_NAMES[:-1])} or {_PATH_NAMES[-1]}"
        columns = nearest_names("path", table.column_names)
        fix = f"Name the column of paths with ?path=COLUMN; its columns are like: {columns}"
        raise ImageError(what, where=where, fix=fix)
    asked = column_names(options.group, table.column_names) or (None,)
    groups = [_choose(table, name, _GROUP_NAMES, where) for name in asked]
    return _Columns(
        path=path,
        label=_choose(table, options.label, _LABEL_NAMES, where),
        groups=tuple(name for name in groups if name is not None),
        mask=_choose(table, options.mask, (), where),
    )


def _choose(table: pa.Table, asked: str | None, usual: Sequence[str], where: Path) -> str | None:
    """The column that was asked for, else the first of the usual names that is there."""
    if asked is None:
        return next((name for name in usual if name in table.column_names), None)
    if asked not in table.column_names:
        what = f"This manifest has no column {asked!r}"
        fix = f"The nearest of its columns: {nearest_names(asked, table.column_names)}"
        raise ImageError(what, where=where, fix=fix)
    return asked


def _list_entries(table: pa.Table, columns: _Columns, where: Path) -> tuple[ImageEntry, ...]:
    refs = _refs(table, columns.path, where)
    labels = _cells(table, columns.label, where)
    described = {
        name: _cells(table, name, where)
        for name in columns.described(table.column_names)
        if _holds_values(table.column(name))
    }
    given = {name: _cells(table, name, where) for name in columns.groups}
    groups = join_groups(given) if given else [None] * len(refs)
    metadata = [{name: cells[row] for name, cells in described.items()} for row in range(len(refs))]
    return tuple(
        ImageEntry(ref=ref, label=label, group=group, metadata=more)
        for ref, label, group, more in zip(refs, labels, groups, metadata, strict=True)
    )


def _refs(table: pa.Table, column: str, where: Path) -> list[str]:
    """The paths, each given and given once."""
    refs = []
    for row, path in enumerate(_cells(table, column, where), start=1):
        if path is None:
            what = f"Row {row} has no path"
            raise ImageError(what, where=where, fix="Fill in the path or remove the row")
        refs.append(PurePosixPath(path).as_posix())
    _check_distinct(refs, where)
    return refs


def _cells(table: pa.Table, name: str | None, where: Path) -> list[str | None]:
    """A column as text, None for an empty cell; all None where there is no such column."""
    if name is None:
        return [None] * table.num_rows
    column = table.column(name)
    if not _holds_values(column):
        what = f"Column {name!r} holds {column.type}, not one value a row"
        fix = "Choose a column of text; a table with images inside opens as hf:FOLDER"
        raise ImageError(what, where=where, fix=fix)
    return [None if _is_empty(value) else str(value) for value in column.to_pylist()]


def _holds_values(column: pa.ChunkedArray) -> bool:
    """Whether a column holds one value a row that text can say."""
    types, kind = pa.types, column.type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(kind) or types.is_large_string(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(is_text or is_number or types.is_boolean(kind) or types.is_temporal(kind))


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _check_distinct(refs: Iterable[str], where: Path) -> None:
    first_row: dict[str, int] = {}
    for row, ref in enumerate(refs, start=1):
        earlier = first_row.setdefault(posixpath.normpath(ref), row)
        if earlier != row:
            what = f"Rows {earlier} and {row} name the same path {ref}"
            raise ImageError(what, where=where, fix="Keep one row for each image")


def _check_reachable(path: Path, root: Path, refs: Sequence[str]) -> None:
    """Refuse a manifest whose paths start elsewhere, naming the folder where they do."""
    tried = refs[:_N_PATHS_TRIED]
    if any(is_there(root / ref) for ref in tried):
        return
    folders = (child for child in sorted(path.parent.iterdir()) if is_folder(child))
    matches = (child.name for child in folders if any(is_there(child / ref) for ref in tried))
    found = next(itertools.chain(matches), None)
    what = f"None of the first {len(tried)} paths leads to a file, the first being {root / refs[0]}"
    where_they_are = f"?root={found}" if found else "?root=FOLDER"
    fix = f"Say where the paths start with {where_they_are}, relative to the manifest"
    raise ImageError(what, where=path, fix=fix)
