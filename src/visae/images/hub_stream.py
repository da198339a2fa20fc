"""A Hugging Face dataset read as it arrives: ``hf://owner/dataset:split?streaming=1&n=10000``."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from visae.errors import ImageError
from visae.images.decode import decode
from visae.images.hub_address import HubAddress
from visae.images.hub_columns import choose_columns, stored_bytes, value_text
from visae.images.hub_loading import import_datasets, load_stream
from visae.images.masks import ImagePair
from visae.images.row_stream import RowStream
from visae.images.source import ImageEntry, LoadedImage, row_number
from visae.storage.hashing import hash_bytes

__all__ = ["HubStream"]


@final
class HubStream:
    """The first rows of a dataset, one after another; refs are row numbers ("0", "1", …).

    Nothing is downloaded but what is read. Labels, groups and metadata come with each image
    (``LoadedImage.entry``), so that ``entries`` holds numbers only. Reading far back starts the
    stream again: record the images once, and later verbs read the store.

    Args:
        location: As of ``HubImages``, with ``streaming=1`` and, unless the dataset says how many
            rows the split has, ``n``.

    Raises:
        ImageError: as ``HubImages``, or when the number of rows or the columns are not known, or
            several columns of groups are asked for.
    """

    def __init__(self, location: str) -> None:
        self._address = HubAddress.parse(location)
        datasets = import_datasets()
        rows = load_stream(datasets, self._address)
        n_rows = _number_of_rows(rows, self._address)
        self._entries = tuple(ImageEntry(ref=str(row)) for row in range(n_rows))
        self._columns = choose_columns(datasets, _features(rows, self._address), self._address)
        if len(self._columns.groups) > 1:
            what = "Groups of several columns need all rows, and a stream has one at a time"
            fix = "Name one column with ?group=, or leave ?streaming=1 out"
            raise ImageError(what, where=self._address, fix=fix)
        self._kinds = {name: rows.features[name] for name in self._columns.texts}
        rows = rows.select_columns([*self._columns.images, *self._columns.texts])
        for name in self._columns.images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self._stream = RowStream(rows, where=self.location)

    @property
    def location(self) -> str:
        """The location, with an absolute path where it is a folder."""
        return str(self._address)

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every row, by its number alone."""
        return self._entries

    @property
    def is_stream(self) -> bool:
        """Always true."""
        return True

    def load(self, ref: str) -> LoadedImage:
        """Read the image of one row, with its label, group and metadata.

        Raises:
            ImageError: when there is no such row, it holds no image, or it cannot be read.
            VisaeError: when the stream breaks off.
        """
        pair = self.pair(ref)
        pixels = decode(pair.image, where=ref)
        return LoadedImage(hash_bytes(pair.image), pixels, entry=pair.entry)

    def pair(self, ref: str) -> ImagePair:
        """The stored bytes of one row's image and of its mask, and what the row says.

        Raises:
            ImageError: as ``load``, or when the mask cannot be read.
            VisaeError: when the stream breaks off.
        """
        row = self._stream.row(row_number(ref, len(self._entries), where=self.location))
        image, mask = stored_bytes(row[self._columns.image], ref), self._columns.mask
        if image is None:
            fix = "Remove the row from the dataset"
            raise ImageError("The row holds no image", where=ref, fix=fix)
        mask_bytes = None if mask is None else stored_bytes(row[mask], f"mask of {ref}")
        return ImagePair(image, mask_bytes, self._entry(ref, row))

    def _entry(self, ref: str, row: Mapping[str, Any]) -> ImageEntry:
        datasets, columns = import_datasets(), self._columns
        texts = {name: value_text(datasets, kind, row[name]) for name, kind in self._kinds.items()}
        return ImageEntry(
            ref=ref,
            label=None if columns.label is None else texts[columns.label],
            group=texts[columns.groups[0]] if columns.groups else None,
            metadata={name: texts[name] for name in columns.metadata},
        )


def _number_of_rows(rows: Any, address: HubAddress) -> int:
    """What was asked for, at most what the dataset says that it has."""
    asked = address.options.n_rows
    stated = (rows.info.splits or {}).get(address.split or "train")
    known = 0 if stated is None else int(stated.num_examples or 0)
    if not asked and not known:
        what = "This dataset does not say how many rows the split has"
        raise ImageError(what, where=address, fix="Give how many to use with ?n=")
    if asked and known and asked > known:
        what = f"This dataset has {known} rows, fewer than ?n={asked}"
        raise ImageError(what, where=address, fix="Ask for fewer, or leave ?n= out")
    return asked or known


def _features(rows: Any, address: HubAddress) -> Any:
    if rows.features is None:
        what = "This dataset does not say which columns it has"
        raise ImageError(what, where=address, fix="Leave ?streaming=1 out")
    return rows.features
