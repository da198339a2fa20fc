"""A segmentation folder: images in one folder, their masks under the same names in another.

``seg:FOLDER`` reads ``FOLDER/images`` and ``FOLDER/masks``, and the names of the classes from
``classes.csv``, ``classes.txt`` or ``classes.json`` where the folder holds one.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import final

from visae.errors import ImageError
from visae.images.class_names import CLASS_FILES
from visae.images.decode import read_file
from visae.images.folder import list_images
from visae.images.location import is_folder, is_there, join_options, nearest_siblings
from visae.images.masks import ImagePair, MaskOptions
from visae.images.source import ImageEntry

__all__ = ["SegmentationFolder", "SegmentationOptions"]

_N_NAMED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationOptions(MaskOptions):
    """Where the two halves of a segmentation folder are; the options of ``seg:FOLDER``."""

    images: str | None = None
    """Folder of images inside the folder; unset: images."""
    masks: str | None = None
    """Folder of masks inside the folder; unset: masks."""
    split: str | None = None
    """The one subfolder of both to use, such as train; unset: all of them."""


@final
class SegmentationFolder:
    """Pairs of image and mask, in code-point order of their paths.

    The mask of ``images/train/a.jpg`` is ``masks/train/a.png`` (or another suffix). A ref is the
    image's path below ``images``. The folder that an image lies in is the metadata ``folder``;
    there are no labels of whole images.

    Args:
        folder: What holds the two folders.
        options: What they are called, and how to read the masks.

    Raises:
        ImageError: when a folder is missing or empty, an image has no mask or several, or a mask
            has no image.
    """

    def __init__(self, folder: Path, options: SegmentationOptions | None = None) -> None:
        self._folder, self._options = folder.absolute(), options or SegmentationOptions()
        names = self._options.images or "images", self._options.masks or "masks"
        self._images, self._masks = (_half(self._folder, name, self._options) for name in names)
        images, masks = _by_stem(self._images), _by_stem(self._masks)
        _check_pairs(images, masks, self._images, self._masks)
        self._mask_of = {image: masks[stem] for stem, image in images.items()}
        self._entries = tuple(_as_entry(ref) for ref in sorted(self._mask_of))

    @property
    def location(self) -> str:
        """``seg:``, the absolute path of the folder and its options."""
        return join_options(f"seg:{self._folder.as_posix()}", dataclasses.asdict(self._options))

    @property
    def folder(self) -> Path:
        """The absolute path of the folder."""
        return self._folder

    @property
    def mask_options(self) -> MaskOptions:
        """How to read the masks, with the file of class names that the folder holds."""
        if self._options.classes is not None:
            return self._options
        found = [name for name in CLASS_FILES if is_there(self._folder / name)]
        if len(found) > 1:
            what = f"There are several files of class names: {', '.join(found)}"
            raise ImageError(what, where=self._folder, fix=f"Choose with ?classes={found[0]}")
        return dataclasses.replace(self._options, classes=found[0] if found else None)

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every image, in code-point order of its path."""
        return self._entries

    def pair(self, ref: str) -> ImagePair:
        """The bytes of a listed image and of its mask.

        Raises:
            ImageError: when the ref was not listed or a file cannot be read.
        """
        if ref not in self._mask_of:
            what = f"No image of this name was found in {self._images}"
            raise ImageError(what, where=ref, fix="Use a ref that `entries` lists")
        mask = self._masks / self._mask_of[ref]
        return ImagePair(
            read_file(self._images / ref, where=ref), read_file(mask, where=f"mask of {ref}")
        )


def _half(folder: Path, name: str, options: SegmentationOptions) -> Path:
    """The folder of images or that of masks."""
    found = folder / name / (options.split or "")
    if not is_folder(found):
        fix = f"Name the two folders with ?images= and ?masks=; {nearest_siblings(found)}"
        raise ImageError("There is no such folder", where=found, fix=fix)
    return found


def _by_stem(folder: Path) -> dict[str, str]:
    """The path of each image below a folder, by its path without suffix."""
    paths: dict[str, str] = {}
    for path in list_images(folder):
        stem = PurePosixPath(path).with_suffix("").as_posix()
        earlier = paths.setdefault(stem, path)
        if earlier != path:
            what = f"{earlier} and {path} differ only in their suffix"
            raise ImageError(what, where=folder, fix="Remove or rename one of them")
    return paths


def _check_pairs(
    images: Collection[str], masks: Collection[str], images_dir: Path, masks_dir: Path
) -> None:
    for have, lack, where, what in (
        (images, masks, masks_dir, "images without a mask"),
        (masks, images, images_dir, "masks without an image"),
    ):
        alone = sorted(set(have) - set(lack))
        if alone:
            first = ", ".join(alone[:_N_NAMED])
            raise ImageError(
                f"There are {len(alone)} {what}, the first being {first}",
                where=where,
                fix="Give each the same path but for the suffix, or list pairs in a manifest with "
                "?mask=COLUMN",
            )


def _as_entry(ref: str) -> ImageEntry:
    parent = PurePosixPath(ref).parent.as_posix()
    return ImageEntry(ref=ref, metadata={"folder": None if parent == "." else parent})
