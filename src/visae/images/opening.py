"""One door to every source: what a user types after ``--images`` becomes an ``ImageSource``."""

from pathlib import Path

from visae.errors import ImageError
from visae.images.bundled import BundledImages
from visae.images.folder import FolderImages
from visae.images.hub import HubImages
from visae.images.location import is_folder, is_there, nearest_siblings, split_options
from visae.images.manifest import MANIFEST_SUFFIXES, ManifestImages, ManifestOptions
from visae.images.source import ImageSource
from visae.storage.records import from_plain

__all__ = ["open_images"]

_FORMS = (
    "a folder of images; a .csv or .parquet manifest, with options as in "
    "labels.csv?label=name&root=images; bundled:cifar10; hf://owner/dataset:split; "
    "hf:FOLDER for a saved dataset"
)


def open_images(location: str | Path) -> ImageSource:
    """The images at a location.

    A location is a folder, a ``.csv`` or ``.parquet`` manifest (with options as in
    ``labels.csv?label=name&root=images``), ``bundled:NAME``, ``hf://owner/dataset:split`` or
    ``hf:FOLDER``.

    Raises:
        ImageError: when the location is none of these, is missing or holds no images; the message
            lists the accepted forms and the nearest names that exist.
    """
    text = str(location)
    if text.startswith("bundled:"):
        return BundledImages(text.removeprefix("bundled:"))
    if text.startswith("hf:"):
        return HubImages(text)
    address, options = split_options(text)
    path = Path(address)
    if path.suffix.lower() in MANIFEST_SUFFIXES and not is_folder(path):
        named = from_plain(ManifestOptions, options, where=text, error=ImageError)
        return ManifestImages(path, named)
    if options:
        fix = "Remove what follows the question mark"
        raise ImageError("Only manifests and hf: take options", where=text, fix=fix)
    if is_folder(path):
        return FolderImages(path)
    if is_there(path):
        what, hint = "This file is no list of images", ""
    else:
        what, hint = "There is nothing of this name", f". {nearest_siblings(path)}"
    raise ImageError(what, where=text, fix=f"Give one of: {_FORMS}{hint}")
