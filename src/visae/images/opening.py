"""One door to every source: what a user types after ``--images`` becomes an ``ImageSource``."""

from pathlib import Path

from visae.errors import ImageError
from visae.images.bundled import BundledImages
from visae.images.folder import FolderImages
from visae.images.hub import HubImages
from visae.images.location import is_folder, is_there, nearest_siblings, split_options
from visae.images.manifest import MANIFEST_SUFFIXES, ManifestImages, ManifestOptions
from visae.images.masks import MaskedImages
from visae.images.segmentation import SegmentationFolder, SegmentationOptions
from visae.images.source import ImageSource
from visae.storage.records import from_plain

__all__ = ["open_images"]

_FORMS = (
    "a folder of images; a .csv or .parquet manifest, with options as in "
    "labels.csv?label=name&root=images; seg:FOLDER with images/ and masks/ in it; "
    "bundled:cifar10; hf://owner/dataset:split; hf:FOLDER for a saved dataset"
)


def open_images(location: str | Path) -> ImageSource:
    """The images at a location.

    A location is a folder, a ``.csv`` or ``.parquet`` manifest (with options as in
    ``labels.csv?label=name&root=images``), ``seg:FOLDER``, ``bundled:NAME``,
    ``hf://owner/dataset:split`` or ``hf:FOLDER``. Images with masks come as a ``MaskedSource``.

    Raises:
        ImageError: when the location is none of these, is missing or holds no images; the message
            lists the accepted forms and the nearest names that exist.
    """
    text = str(location)
    scheme, _, address = text.partition(":")
    if scheme == "bundled":
        return BundledImages(address)
    if scheme == "hf":
        return HubImages(text)
    if scheme == "seg":
        return _open_segmentation(address)
    return _open_path(text)


def _open_segmentation(text: str) -> MaskedImages:
    address, options = split_options(text)
    named = from_plain(SegmentationOptions, options, where=f"seg:{text}", error=ImageError)
    found = SegmentationFolder(Path(address), named)
    return MaskedImages(found, found.mask_options, folder=found.folder)


def _open_path(text: str) -> ImageSource:
    address, options = split_options(text)
    path = Path(address)
    if path.suffix.lower() in MANIFEST_SUFFIXES and not is_folder(path):
        return _open_manifest(path, options, text)
    if options:
        fix = "Remove what follows the question mark"
        raise ImageError("Only manifests, seg: and hf: take options", where=text, fix=fix)
    if is_folder(path):
        return FolderImages(path)
    if is_there(path):
        what, hint = "This file is no list of images", ""
    else:
        what, hint = "There is nothing of this name", f". {nearest_siblings(path)}"
    raise ImageError(what, where=text, fix=f"Give one of: {_FORMS}{hint}")


def _open_manifest(path: Path, options: dict[str, str], where: str) -> ImageSource:
    named = from_plain(ManifestOptions, options, where=where, error=ImageError)
    manifest = ManifestImages(path, named)
    if named.mask is not None:
        return MaskedImages(manifest, named, folder=manifest.folder)
    if named.classes or named.ignore or named.exif:
        what = "?classes=, ?ignore= and ?exif= are about masks, and no column of masks is named"
        raise ImageError(what, where=where, fix="Name it with ?mask=COLUMN")
    return manifest
