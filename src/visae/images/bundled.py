"""Image sets inside the package: one PNG sheet of equal tiles and one JSON of labels.

``bundled:cifar10`` is ``data/cifar10.png`` with ``data/cifar10.json`` beside this module: tiles in
row-major order on a grid, so that a demo and a test need no download.
"""

import dataclasses
import functools
import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import final

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from visae.errors import ImageError, nearest_names
from visae.images.decode import decode
from visae.images.source import ImageEntry, LoadedImage, row_number
from visae.storage.hashing import hash_bytes
from visae.storage.records import from_plain

__all__ = ["BundledImages", "SheetDescription"]

_REINSTALL = "Install visae again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SheetDescription:
    """What the JSON beside a sheet says."""

    classes: tuple[str, ...]
    """Names of the classes."""
    labels: tuple[int, ...]
    """Index into ``classes`` of each image, in the order of the tiles."""
    tile: int
    """Height and width of an image in pixels."""
    columns: int
    """Images in a full row of the sheet."""
    source: str
    """Where the images come from, as one would cite it."""
    licence: str
    """Terms under which they may be used."""

    def __post_init__(self) -> None:
        in_range = all(0 <= label < len(self.classes) for label in self.labels)
        if not self.labels or not in_range or min(self.tile, self.columns) < 1:
            raise ImageError("The labels of a bundled sheet do not fit its classes or tiles")


@final
class BundledImages:
    """Images of one sheet; refs are positions ("0", "1", …), labels are class names.

    The sheet is decoded once, when the first image is loaded, and stays in memory (width times
    height times 3 bytes). A content id is SHA-256 over ``rgb8:{tile}x{tile}:`` and the tile's raw
    RGB bytes, since no bytes are stored for each image.

    Args:
        name: Name of the sheet, without suffix.
        folder: Where the pair of files is; the package's own data unless given.

    Raises:
        ImageError: when there is no such sheet or its description is damaged.
    """

    def __init__(self, name: str, *, folder: Traversable | None = None) -> None:
        self._name = name
        self._folder = files("visae.images") / "data" if folder is None else folder
        self._description = _read_description(name, self._folder)

    @property
    def location(self) -> str:
        """``bundled:`` and the name."""
        return f"bundled:{self._name}"

    @property
    def description(self) -> SheetDescription:
        """Classes, labels, source and licence of the images."""
        return self._description

    @functools.cached_property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Every image, in the order of the tiles."""
        names = [self._description.classes[label] for label in self._description.labels]
        return tuple(ImageEntry(ref=str(i), label=name) for i, name in enumerate(names))

    def load(self, ref: str) -> LoadedImage:
        """Cut one tile out of the sheet.

        Raises:
            ImageError: when there is no image of this number or the sheet is damaged.
        """
        position = row_number(ref, len(self._description.labels), where=self.location)
        tile, columns = self._description.tile, self._description.columns
        row, column = divmod(position, columns)
        top, left = row * tile, column * tile
        pixels = np.ascontiguousarray(self._sheet[top : top + tile, left : left + tile])
        content_id = hash_bytes(f"rgb8:{tile}x{tile}:".encode() + pixels.tobytes())
        return LoadedImage(content_id, Image.fromarray(pixels))

    @functools.cached_property
    def _sheet(self) -> UInt8[np.ndarray, "height width 3"]:
        where = f"{self._name}.png"
        try:
            data = (self._folder / where).read_bytes()
        except OSError as failure:
            what = "A bundled sheet cannot be read"
            raise ImageError(what, where=where, fix=_REINSTALL) from failure
        sheet = np.asarray(decode(data, where=where))
        tile, columns = self._description.tile, self._description.columns
        n_rows = -(-len(self._description.labels) // columns)
        if sheet.shape[0] < n_rows * tile or sheet.shape[1] != columns * tile:
            what = f"A bundled sheet of shape {sheet.shape} does not fit its description"
            raise ImageError(what, where=where, fix=_REINSTALL)
        return sheet


def _read_description(name: str, folder: Traversable) -> SheetDescription:
    known = [f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")]
    if name not in known:
        what = f"No images called {name!r} come with visae"
        raise ImageError(what, fix=f"Choose one of: {nearest_names(name, known)}")
    where = f"{name}.json"
    try:
        data = json.loads((folder / where).read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        what = "A bundled description cannot be read"
        raise ImageError(what, where=where, fix=_REINSTALL) from failure
    return from_plain(SheetDescription, data, where=where, error=ImageError)
