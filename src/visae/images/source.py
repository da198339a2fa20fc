"""The ``ImageSource`` extension point: anything that lists images and hands out pixels.

A source lists ``ImageEntry`` rows in a fixed order and loads one at a time as upright RGB pixels
with a content id, and with a mask where it is a ``MaskedSource``. ``visae.images.open_images``
turns what a user types after ``--images`` into one. Sources are picklable and may be used by forked
processes and by several threads at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from visae.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ImageEntry",
    "ImageSource",
    "LoadedImage",
    "MaskedSource",
    "StreamedSource",
    "row_number",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a source, before it is read."""

    ref: str
    """How the source finds it: a path relative to the source, or a row number."""
    label: str | None = None
    """Name of its class, where the source has one."""
    group: str | None = None
    """What must not be divided by a split (patient, site, species), where the source has one."""
    metadata: Mapping[str, str | None] = dataclasses.field(default_factory=dict, hash=False)
    """Whatever else the source says of it, by name, as text; the names are those of every entry."""


class LoadedImage(NamedTuple):
    """One image, read."""

    content_id: str
    """SHA-256 of the stored bytes (of the pixels, where a source stores no bytes per image)."""
    pixels: "Image.Image"
    """Upright, 8-bit RGB."""
    mask: "Image.Image | None" = None
    """Class value of each pixel (mode "I", the size of ``pixels``), −1 where the value is ignored;
    None where the image has no mask."""
    mask_id: str | None = None
    """SHA-256 of the mask's stored bytes. The content id leaves the mask out, so that one image has
    one side of a split, whoever drew its mask."""
    entry: ImageEntry | None = None
    """What reading the image told about it, in place of the listed entry; None where the listed one
    is right. Only streams, which cannot know a label before they read it, give one."""


@runtime_checkable
class ImageSource(Protocol):
    """Lists images in a fixed order and loads them one at a time."""

    @property
    def location(self) -> str:
        """What ``open_images`` needs to open this source again."""

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every image, in a fixed order that does not depend on the machine."""

    def load(self, ref: str) -> LoadedImage:
        """Read one image.

        Raises:
            ImageError: when this image is missing, corrupt, truncated or too large; the message
                is the reason written to ``skipped.csv``.
        """


@runtime_checkable
class MaskedSource(ImageSource, Protocol):
    """A source whose images carry masks of class values."""

    @property
    def mask_classes(self) -> Mapping[int, str]:
        """Name of each class value, without the ignored ones.

        Empty where the source names none: each value that occurs is then a class of its own, named
        by its number.
        """


@runtime_checkable
class StreamedSource(ImageSource, Protocol):
    """A source that may only be able to give its images one after another."""

    @property
    def is_stream(self) -> bool:
        """Whether an image costs reading all that come before it.

        A stream is to be read by one process in the order of its entries; a few images out of order
        (threads of one process) cost nothing.
        """


def row_number(ref: str, n_rows: int, *, where: str) -> int:
    """The row that a ref of a source without names stands for.

    Raises:
        ImageError: unless the ref is a number from 0 to ``n_rows`` − 1.
    """
    is_number = ref.isascii() and ref.isdecimal() and len(ref) <= len(str(n_rows))
    if not is_number or int(ref) >= n_rows:
        fix = f"Give a number from 0 to {n_rows - 1}"
        raise ImageError(f"There is no image {ref!r}", where=where, fix=fix)
    return int(ref)
