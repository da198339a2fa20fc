"""The ``ImageSource`` extension point: anything that lists images and hands out pixels.

A source lists ``ImageEntry`` rows in a fixed order and loads one at a time as upright RGB pixels
with a content id. ``visae.images.open_images`` turns what a user types after ``--images`` into one.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from visae.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageEntry", "ImageSource", "LoadedImage", "row_number"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEntry:
    """One image of a source, before it is read."""

    ref: str
    """How the source finds it: a path relative to the source, or a row number."""
    label: str | None = None
    """Name of its class, where the source has one."""
    group: str | None = None
    """What must not be divided by a split (patient, site, species), where the source has one."""


class LoadedImage(NamedTuple):
    """One image, read."""

    content_id: str
    """SHA-256 of the stored bytes (of the pixels, where a source stores no bytes per image)."""
    pixels: "Image.Image"
    """Upright, 8-bit RGB."""


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
