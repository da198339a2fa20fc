"""A folder of images as a source: class folders, or one flat folder without labels."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

from visae.errors import ImageError
from visae.images.decode import read_image
from visae.images.location import is_folder, is_there, nearest_siblings
from visae.images.source import ImageEntry, LoadedImage

__all__ = ["IMAGE_SUFFIXES", "FolderImages", "list_images"]

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".ppm",
    ".pgm",
)


@final
class FolderImages:
    """Every image below a folder, in the order of their paths.

    The name of the first folder on the way to an image is its label; images that lie directly in
    the root have none. Hidden files and folders are left out. Linked folders are followed, except
    into a folder that already lies on the way. Refs are paths relative to the root, with forward
    slashes, in code-point order.

    Raises:
        ImageError: when the folder is missing, cannot be opened, is a file or holds no image.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._entries = tuple(_as_entry(ref) for ref in list_images(self._root))
        self._refs = frozenset(entry.ref for entry in self._entries)

    @property
    def location(self) -> str:
        """The absolute path of the folder."""
        return self._root.as_posix()

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Every image, in code-point order of its path."""
        return self._entries

    def load(self, ref: str) -> LoadedImage:
        """Read one of the listed images.

        Raises:
            ImageError: when the ref was not listed (which refuses every path that leaves the
                folder) or the image cannot be read.
        """
        if ref not in self._refs:
            what = f"No image of this name was found in {self._root}"
            raise ImageError(what, where=ref, fix="Use a ref that `entries` lists")
        return read_image(self._root / ref, where=ref)


def list_images(root: Path) -> list[str]:
    """The relative path of every image below a folder, in code-point order.

    Raises:
        ImageError: when the folder is missing, cannot be opened, is a file or holds no image.
    """
    _check_folder(root)
    refs, n_others = [], 0
    for ref in _walk(root):
        if ref.lower().endswith(IMAGE_SUFFIXES):
            refs.append(_check_text(ref, root))
        else:
            n_others += 1
    if not refs:
        what = f"This folder holds no image, but {n_others} other file{'s'[: n_others != 1]}"
        fix = f"Give a folder with files ending in {', '.join(IMAGE_SUFFIXES)}"
        raise ImageError(what, where=root, fix=fix)
    return sorted(refs)


def _check_folder(root: Path) -> None:
    if is_folder(root):
        return
    if is_there(root):
        what, fix = "This is a file, not a folder", "Give the folder that holds the images"
    else:
        what = "There is no such folder, or no permission to see it"
        fix = f"Check the path; {nearest_siblings(root)}"
    raise ImageError(what, where=root, fix=fix)


def _as_entry(ref: str) -> ImageEntry:
    first, slash, _ = ref.partition("/")
    return ImageEntry(ref=ref, label=first if slash else None)


def _walk(root: Path) -> Iterator[str]:
    """The relative path of every visible file below a folder, in no particular order."""
    pending = [("", frozenset({root.resolve()}))]
    while pending:
        prefix, above = pending.pop()
        for name, leads_on in _children(root / prefix):
            if not leads_on:
                yield prefix + name
                continue
            real = (root / prefix / name).resolve()
            if real not in above:
                pending.append((f"{prefix}{name}/", above | {real}))


def _children(folder: Path) -> list[tuple[str, bool]]:
    """Name of each visible file and folder in a folder, and whether it is a folder."""
    try:
        with os.scandir(folder) as children:
            return [(c.name, _leads_on(c)) for c in children if not c.name.startswith(".")]
    except OSError as failure:
        reason = (failure.strerror or "unknown reason").lower()
        what = f"This folder cannot be opened: {reason}"
        fix = "Check its permissions, or move it away"
        raise ImageError(what, where=folder, fix=fix) from failure


def _leads_on(child: os.DirEntry[str]) -> bool:
    # Path.is_dir, unlike DirEntry.is_dir, is false for a link that leads to itself.
    return Path(child.path).is_dir() if child.is_symlink() else child.is_dir()


def _check_text(ref: str, root: Path) -> str:
    try:
        ref.encode()
    except UnicodeEncodeError as failure:
        what = f"The file name {ref!a} is not valid UTF-8"
        raise ImageError(what, where=root, fix="Rename the file") from failure
    return ref
