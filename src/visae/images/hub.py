"""Hugging Face datasets as a source: ``hf://owner/dataset:split`` or a dataset saved on disk."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, final

from visae.errors import ImageError
from visae.images.decode import decode
from visae.images.groups import join_groups
from visae.images.hub_address import HubAddress
from visae.images.hub_columns import HubColumns, choose_columns, stored_bytes, value_text
from visae.images.hub_loading import import_datasets, load_rows
from visae.images.masks import ImagePair
from visae.images.source import ImageEntry, LoadedImage, row_number
from visae.storage.hashing import hash_bytes

__all__ = ["HubImages"]


@final
class HubImages:
    """The rows of a dataset, in its order; refs are row numbers ("0", "1", …).

    Integer labels of class type become their names, −1 becomes no label. Columns without a meaning
    are metadata, as text, where they hold one value a row. A content id is the SHA-256 of the
    encoded bytes that the dataset stores.

    Args:
        location: ``hf://owner/dataset[:split][?options]``, or ``hf:FOLDER[:split][?options]`` for
            a folder written by ``save_to_disk`` or any that ``load_dataset`` reads.

    Raises:
        ImageError: when the package ``datasets`` is not installed, the hub cannot be reached, or
            there is no such dataset, split or column.
    """

    def __init__(self, location: str) -> None:
        self._address = HubAddress.parse(location)
        datasets = import_datasets()
        rows = load_rows(datasets, self._address)
        self._columns = choose_columns(datasets, rows.features, self._address)
        self._entries = _list_entries(datasets, rows, self._columns)
        encoded = datasets.Image(decode=False)
        self._rows = rows.select_columns(list(self._columns.images))
        for name in self._columns.images:
            self._rows = self._rows.cast_column(name, encoded)

    @property
    def location(self) -> str:
        """The location, with an absolute path where it is a folder."""
        return str(self._address)

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Every row, in the order of the dataset."""
        return self._entries

    def load(self, ref: str) -> LoadedImage:
        """Read the image of one row.

        Raises:
            ImageError: when there is no such row, it holds no image, or it cannot be read.
        """
        data = self.pair(ref).image
        return LoadedImage(hash_bytes(data), decode(data, where=ref))

    def pair(self, ref: str) -> ImagePair:
        """The stored bytes of one row's image and of its mask.

        Raises:
            ImageError: as ``load``, or when the mask cannot be read.
        """
        row = self._rows[row_number(ref, len(self._entries), where=self.location)]
        image = stored_bytes(row[self._columns.image], ref)
        if image is None:
            fix = "Remove the row from the dataset"
            raise ImageError("The row holds no image", where=ref, fix=fix)
        mask = self._columns.mask
        return ImagePair(image, None if mask is None else stored_bytes(row[mask], f"mask of {ref}"))


def _list_entries(datasets: ModuleType, rows: Any, columns: HubColumns) -> tuple[ImageEntry, ...]:
    texts = {name: _texts(datasets, rows, name) for name in columns.texts}
    nothing: Sequence[str | None] = [None] * len(rows)
    labels = nothing if columns.label is None else texts[columns.label]
    grouped = {name: texts[name] for name in columns.groups}
    groups = join_groups(grouped) if grouped else nothing
    return tuple(
        ImageEntry(
            ref=str(row),
            label=label,
            group=group,
            metadata={name: texts[name][row] for name in columns.metadata},
        )
        for row, (label, group) in enumerate(zip(labels, groups, strict=True))
    )


def _texts(datasets: ModuleType, rows: Any, column: str) -> list[str | None]:
    kind = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return [value_text(datasets, kind, value) for value in values]
