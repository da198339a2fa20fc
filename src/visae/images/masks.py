"""Images with masks of classes, whatever source they lie in.

A source that can hand out the bytes of an image and of its mask is a ``PairSource``;
``MaskedImages`` makes a ``MaskedSource`` of it by the options that all of them share.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Int32
from PIL import Image

from visae.errors import ImageError
from visae.images.class_names import read_class_names
from visae.images.decode import decode_oriented
from visae.images.mask_decode import MaskTurn, decode_mask
from visae.images.source import ImageEntry, LoadedImage, StreamedSource
from visae.storage.hashing import hash_bytes

__all__ = ["ImagePair", "MaskOptions", "MaskedImages", "PairSource"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How to read masks; options of every location whose images have some."""

    classes: str | None = None
    """File of class names (.csv, .txt or .json); unset: each value is a class of that number."""
    ignore: str | None = None
    """Values that stand for no class, joined by commas."""
    exif: MaskTurn | None = None
    """Whether the EXIF orientation of an image goes for its mask (both) or not (image)."""

    @property
    def ignored(self) -> tuple[int, ...]:
        """The values that stand for no class.

        Raises:
            ImageError: when they are not whole numbers from 0 up, joined by commas.
        """
        texts = self.ignore.split(",") if self.ignore else []
        if not all(text.isascii() and text.isdecimal() and len(text) < 10 for text in texts):
            fix = "Write whole numbers joined by commas, as in ?ignore=11,255"
            raise ImageError(f"?ignore={self.ignore} cannot be read", fix=fix)
        return tuple(int(text) for text in texts)


class ImagePair(NamedTuple):
    """An image and its mask, not yet decoded."""

    image: bytes
    """The bytes of the image's file."""
    mask: bytes | None
    """The bytes of the mask's file, None where the image has none."""
    entry: ImageEntry | None = None
    """What reading told about the image; see ``LoadedImage.entry``."""


@runtime_checkable
class PairSource(Protocol):
    """A source that can hand out the stored bytes of an image and of its mask; maybe a stream."""

    @property
    def location(self) -> str:
        """What ``open_images`` needs to open this source again."""

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every image, in a fixed order."""

    def pair(self, ref: str) -> "ImagePair":
        """The stored bytes of an image and of its mask.

        Raises:
            ImageError: when either is missing or cannot be read.
        """


@final
class MaskedImages:
    """The images of a source with their masks.

    A content id is the SHA-256 of the image's stored bytes alone, so that an image keeps its side
    of a split when its mask is corrected; a mask's own SHA-256 is ``LoadedImage.mask_id``. Ignored
    values become −1 in the mask. Where classes have names, a value that has none and is not ignored
    makes its image unreadable, so that nothing is taken for background by oversight.

    Args:
        source: Where the images and masks are.
        options: How to read the masks.
        folder: What a relative ``classes`` is relative to.

    Raises:
        ImageError: when the file of class names or the ignored values cannot be read.
    """

    def __init__(self, source: PairSource, options: MaskOptions, *, folder: Path) -> None:
        self._source = source
        self._turn = options.exif
        self._ignored = options.ignored
        self._classes_file = None if options.classes is None else folder / options.classes
        names = {} if self._classes_file is None else read_class_names(self._classes_file)
        self._classes = {v: name for v, name in sorted(names.items()) if v not in self._ignored}

    @property
    def location(self) -> str:
        """The location of the source, with its options."""
        return self._source.location

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every image, in the order of the source."""
        return self._source.entries

    @property
    def mask_classes(self) -> Mapping[int, str]:
        """Name of each class value but the ignored ones; empty where no file names them."""
        return self._classes

    @property
    def is_stream(self) -> bool:
        """Whether the source is a stream."""
        return isinstance(self._source, StreamedSource) and self._source.is_stream

    def load(self, ref: str) -> LoadedImage:
        """Read an image with its mask.

        Raises:
            ImageError: when one of them cannot be read, they do not fit, or the mask holds a value
                without a name.
        """
        pair = self._source.pair(ref)
        image = decode_oriented(pair.image, where=ref)
        loaded = LoadedImage(hash_bytes(pair.image), image.pixels, entry=pair.entry)
        if pair.mask is None:
            return loaded
        values = decode_mask(pair.mask, image, where=ref, turn=self._turn)
        return loaded._replace(
            mask=Image.fromarray(self._without_ignored(values, ref)), mask_id=hash_bytes(pair.mask)
        )

    def _without_ignored(
        self, values: Int32[np.ndarray, "height width"], where: str
    ) -> Int32[np.ndarray, "height width"]:
        """The values with −1 for the ignored ones, each of the others proved to have a name."""
        present = np.flatnonzero(np.bincount(values.ravel()))
        unknown = set(present.tolist()) - {*self._ignored, *(self._classes or present.tolist())}
        if unknown:
            first = ",".join(map(str, sorted(unknown)[:5]))
            raise ImageError(
                f"The mask holds values without a name: {first}",
                where=where,
                fix=f"Name them in {self._classes_file}, or ignore them with ?ignore={first}",
            )
        table = np.arange(present[-1] + 1, dtype=np.int32)
        table[np.isin(table, self._ignored)] = -1
        result: Int32[np.ndarray, "height width"] = table[values]
        return result
