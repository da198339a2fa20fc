"""One door to every source: what a user types after ``--images`` becomes an ``ImageSource``."""

from pathlib import Path

from visae.errors import ImageError
from visae.images.bundled import BundledImages
from visae.images.folder import FolderImages
from visae.images.hub import HubImages
from visae.images.hub_address import HubAddress
from visae.images.hub_stream import HubStream
from visae.images.location import is_folder, is_there, nearest_siblings, split_options
from visae.images.manifest import MANIFEST_SUFFIXES, ManifestImages, ManifestOptions
from visae.images.masks import MaskedImages, MaskOptions
from visae.images.segmentation import SegmentationFolder, SegmentationOptions
from visae.images.source import ImageSource
from visae.images.webdataset import WebDatasetImages, WebDatasetOptions
from visae.storage.records import from_plain

__all__ = ["open_images"]

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_FORMS = (
    "a folder of images; a .csv or .parquet manifest, with options as in "
    "labels.csv?label=name&root=images; seg:FOLDER with images/ and masks/ in it; "
    "wds:shards-{000..009}.tar or one .tar file; "
    "bundled:cifar10; hf://owner/dataset:split; hf:FOLDER for a saved dataset"
)


def open_images(location: str | Path) -> ImageSource:
    """The images at a location.

    A location is a folder, a ``.csv`` or ``.parquet`` manifest (with options as in
    ``labels.csv?label=name&root=images``), ``seg:FOLDER``, ``wds:PATTERN`` or a ``.tar`` file,
    ``bundled:NAME``, ``hf://owner/dataset:split`` or ``hf:FOLDER``. Images with masks come as a
    ``MaskedSource``.

    Raises:
        ImageError: when the location is none of these, is missing or holds no images; the message
            lists the accepted forms and the nearest names that exist.
    """
    text = str(location)
    if not text.strip():
        raise ImageError("No location of images is given", fix=f"Give one of: {_FORMS}")
    scheme, _, address = text.partition(":")
    if scheme == "bundled":
        return BundledImages(address)
    if scheme == "hf":
        return _open_dataset(text)
    if scheme == "seg":
        return _open_segmentation(address)
    if scheme == "wds":
        return _open_webdataset(*split_options(address), where=text)
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
    if path.name.lower().endswith(_TAR_SUFFIXES) and not is_folder(path):
        return _open_webdataset(address, options, where=text)
    if options:
        fix = "Remove what follows the question mark"
        raise ImageError(
            "Only manifests, tar files, seg: and hf: take options", where=text, fix=fix
        )
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
    _refuse_mask_options(named, where, "no column of masks is named")
    return manifest


def _open_webdataset(address: str, options: dict[str, str], where: str) -> ImageSource:
    named = from_plain(WebDatasetOptions, options, where=where, error=ImageError)
    samples = WebDatasetImages(address, named)
    if samples.has_masks:
        return MaskedImages(samples, named, folder=samples.folder)
    _refuse_mask_options(named, where, "no sample has a mask")
    return samples


def _open_dataset(text: str) -> ImageSource:
    options = HubAddress.parse(text).options
    rows = HubImages(text) if options.streaming is None else HubStream(text)
    if options.mask is not None:
        return MaskedImages(rows, options, folder=Path.cwd())
    _refuse_mask_options(options, text, "no column of masks is named")
    return rows


def _refuse_mask_options(options: MaskOptions, where: str, reason: str) -> None:
    if options.classes or options.ignore or options.exif:
        what = f"?classes=, ?ignore= and ?exif= are about masks, but {reason}"
        raise ImageError(what, where=where, fix="Name the masks with ?mask=, or remove these")
