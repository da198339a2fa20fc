"""The pictures behind a store: the recorded images, opened again and checked against their ids.

A store keeps activations and content ids, not pixels. Later stages that show or edit images get
them through ``ActivationStore.source``, which hands out a ``RecordedImages``.
"""

import functools
from typing import final

from visae.errors import ImageError, StoreError
from visae.images.catalog import ImageTable
from visae.images.source import ImageEntry, ImageSource, LoadedImage

__all__ = ["RecordedImages"]

_FIX = "Give the location of the recorded images with --images"


@final
class RecordedImages:
    """The images of a store in its row order; each one loaded proves to be the recorded one.

    Args:
        table: The images as they were recorded.
        source: Where they are found now; it may list others besides.

    Raises:
        StoreError: when the source does not list a recorded image, or its first one has changed.
    """

    def __init__(self, table: ImageTable, source: ImageSource) -> None:
        self._table, self._source = table, source
        listed = {entry.ref for entry in source.entries}
        missing = [ref for ref in table.refs if ref not in listed]
        if missing:
            raise StoreError(
                f"{len(missing)} of the {len(table)} recorded images are not there, the first "
                f"being {missing[0]}",
                where=source.location,
                fix=_FIX,
            )
        for ref in table.refs[:1]:
            self._load_first(ref)

    @property
    def location(self) -> str:
        """Where the images are found now."""
        return self._source.location

    @functools.cached_property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Row i of the store is entry i, with the label, group and metadata that were recorded."""
        return tuple(self._table.entry(row) for row in range(len(self._table)))

    def load(self, ref: str) -> LoadedImage:
        """Read one recorded image.

        Raises:
            ImageError: when it was not recorded or cannot be read.
            StoreError: when its content, or that of its mask, is not what was recorded.
        """
        if ref not in self._content_ids:
            raise ImageError("This image was not recorded", where=ref, fix="Use a ref of `entries`")
        image = self._source.load(ref)
        if image.content_id != self._content_ids[ref]:
            raise StoreError(
                "This is not the image that was recorded under this name: its content differs",
                where=f"{self.location}, {ref}",
                fix=f"{_FIX}, or record again",
            )
        recorded_mask = self._mask_ids.get(ref)
        if recorded_mask and image.mask_id and image.mask_id != recorded_mask:
            raise StoreError(
                "The mask of this image is not the one that was recorded: its content differs",
                where=f"{self.location}, {ref}",
                fix="Restore the mask, or record again for the labels of its patches",
            )
        return image

    @functools.cached_property
    def _mask_ids(self) -> dict[str, str | None]:
        masks = self._table.mask_ids or [None] * len(self._table)
        return dict(zip(self._table.refs, masks, strict=True))

    @functools.cached_property
    def _content_ids(self) -> dict[str, str]:
        return dict(zip(self._table.refs, self._table.content_ids, strict=True))

    def _load_first(self, ref: str) -> None:
        try:
            self.load(ref)
        except ImageError as failure:
            raise StoreError(
                f"A recorded image cannot be read: {failure.what}", where=failure.where, fix=_FIX
            ) from failure
