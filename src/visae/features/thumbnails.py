"""Small pictures of what the model saw, so that a heat map lies exactly on its patches."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from visae.errors import FeatureIndexError, ImageError
from visae.images.source import ImageEntry, ImageSource
from visae.storage.atomic import write_bytes

__all__ = ["read_thumbnail", "thumbnail_bytes", "thumbnail_path", "write_thumbnails"]

_MAX_SIDE = 384
_QUALITY = 90
_THREADS = 4
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_-]{1,200}")


def thumbnail_path(folder: Path, content_id: str) -> Path:
    """Where the thumbnail of an image is, or would be.

    Raises:
        FeatureIndexError: when the content id cannot be the name of a file.
    """
    if not _PLAIN_NAME.fullmatch(content_id):
        raise FeatureIndexError(
            f"The content id {content_id!r} cannot name a file",
            where=folder,
            fix="Give images whose content ids are hexadecimal hashes",
        )
    return folder / "thumbnails" / f"{content_id}.webp"


def write_thumbnails(
    folder: Path,
    entries: Sequence[tuple[ImageEntry, str]],
    source: ImageSource,
    view: Callable[[Image.Image], Image.Image],
) -> Iterator[int]:
    """Write what the patches see of images (entry, content id) that are not there yet.

    ``view`` gives that part of an image's pixels. What is larger than 384 pixels is scaled down as
    a whole. Yields how many are there, after each.

    Raises:
        FeatureIndexError: when an image that was recorded cannot be read any more.
    """

    def write(item: tuple[ImageEntry, str]) -> None:
        entry, content_id = item
        path = thumbnail_path(folder, content_id)
        if not path.is_file():
            write_bytes(path, _thumbnail(source, entry.ref, view))

    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(entries), 256):
            for done, _ in enumerate(threads.map(write, entries[start : start + 256]), start=1):
                yield start + done


def read_thumbnail(folder: Path, content_id: str) -> Image.Image:
    """The view of an image as RGB.

    Raises:
        FeatureIndexError: when it is missing or damaged.
    """
    try:
        with Image.open(io.BytesIO(thumbnail_bytes(folder, content_id)), formats=["WEBP"]) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as failure:
        raise _damaged(folder, content_id) from failure


def thumbnail_bytes(folder: Path, content_id: str) -> bytes:
    """The view of an image as WebP.

    Raises:
        FeatureIndexError: when it is missing.
    """
    try:
        return thumbnail_path(folder, content_id).read_bytes()
    except OSError as failure:
        raise _damaged(folder, content_id) from failure


def _damaged(folder: Path, content_id: str) -> FeatureIndexError:
    return FeatureIndexError(
        "A thumbnail is missing or damaged",
        where=thumbnail_path(folder, content_id),
        fix="Delete it and run visae index again, which makes what is missing",
    )


def _thumbnail(source: ImageSource, ref: str, view: Callable[[Image.Image], Image.Image]) -> bytes:
    try:
        shown = view(source.load(ref).pixels)
    except ImageError as failure:
        raise FeatureIndexError(
            f"A recorded image cannot be read: {failure.what}",
            where=failure.where or ref,
            fix="Restore it, or say where the images are with --images",
        ) from failure
    shown.thumbnail((_MAX_SIDE, _MAX_SIDE))
    data = io.BytesIO()
    shown.save(data, "WEBP", quality=_QUALITY, method=4)
    return data.getvalue()
