"""WebDataset tar files as a source: ``wds:train-{000..009}.tar``, read in any order.

The shards are walked once over their headers, and over the small files that hold labels; images are
read one by one where they lie. Nothing is extracted.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, final

from visae.errors import ImageError, nearest_names
from visae.images.decode import decode
from visae.images.folder import IMAGE_SUFFIXES
from visae.images.groups import column_names, join_groups
from visae.images.location import join_options
from visae.images.masks import ImagePair, MaskOptions
from visae.images.shard_names import find_shards, fixed_folder
from visae.images.source import ImageEntry, LoadedImage
from visae.images.tar_index import TarMember, index_tar, read_member
from visae.images.tar_samples import group_samples
from visae.storage.hashing import hash_bytes

__all__ = ["WebDatasetImages", "WebDatasetOptions"]

_LABEL, _MASKS = "cls", ("mask.png", "seg.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDatasetOptions(MaskOptions):
    """Which files of a sample to use; the options of ``wds:shards.tar?label=json``."""

    image: str | None = None
    """Extension of images, such as left.jpg; unset: the only one of a sample that images have."""
    label: str | None = None
    """Extension of a text, or a field of .json, that is the label; unset: cls, if there."""
    group: str | None = None
    """Extensions or fields that a split keeps whole, joined by commas; unset: none."""
    mask: str | None = None
    """Extension of masks; unset: mask.png or seg.png, if there."""


class _Sample(NamedTuple):
    """A sample, and the archive that it lies in."""

    shard: Path
    files: dict[str, TarMember]

    def read(self, extension: str, ref: str) -> bytes:
        where = f"{ref}.{extension}"
        return read_member(self.shard, self.files[extension], where=where)


@final
class WebDatasetImages:
    """The samples of tar files, shard by shard in the order of the pattern.

    A ref is the shard's path below the folder that the pattern names without wildcards, then the
    sample's key: ``train-000.tar/cat/0001``. Numbers, texts and truth values in a sample's
    ``.json`` are its metadata. A sample without an image is listed and fails when loaded.

    Args:
        pattern: One tar file or several, named with ``*``, ``[ab]``, ``{000..009}`` and
            ``{train,val}``.
        options: Which files of a sample to use.

    Raises:
        ImageError: when nothing fits the pattern, an archive is compressed or damaged, a label file
            cannot be read, or a sample has several images.
    """

    def __init__(self, pattern: str, options: WebDatasetOptions | None = None) -> None:
        self._options = options or WebDatasetOptions()
        self._pattern = Path(pattern).absolute().as_posix()
        self._folder = fixed_folder(self._pattern)
        self._samples: dict[str, _Sample] = {}
        for shard in find_shards(self._pattern):
            for sample in group_samples(index_tar(shard), where=shard):
                ref = f"{shard.relative_to(self._folder).as_posix()}/{sample.key}"
                self._samples[ref] = _Sample(shard, sample.files)
        if not self._samples:
            fix = "Give tar files of samples such as 0001.jpg and 0001.cls"
            raise ImageError("These tar files hold no samples", where=pattern, fix=fix)
        self._entries = _list_entries(self._samples, self._options, where=self._pattern)
        self._image_of = {r: _image(s, self._options, r) for r, s in self._samples.items()}
        self._mask = _mask_extension(self._samples, self._options, where=self._pattern)

    @property
    def location(self) -> str:
        """``wds:``, the absolute pattern and its options."""
        return join_options(f"wds:{self._pattern}", dataclasses.asdict(self._options))

    @property
    def folder(self) -> Path:
        """The absolute path of the folder that all archives lie below."""
        return self._folder

    @property
    def has_masks(self) -> bool:
        """Whether masks were asked for or found."""
        return self._mask is not None

    @property
    def entries(self) -> Sequence[ImageEntry]:
        """Every sample, in the order of the archives."""
        return self._entries

    def load(self, ref: str) -> LoadedImage:
        """Read the image of one sample.

        Raises:
            ImageError: when there is no such sample, or its image is missing or cannot be read.
        """
        data = self._read_image(ref)
        return LoadedImage(hash_bytes(data), decode(data, where=ref))

    def pair(self, ref: str) -> ImagePair:
        """The bytes of a sample's image and of its mask, None where it has no mask.

        Raises:
            ImageError: as ``load``, or when the mask cannot be read.
        """
        data, sample = self._read_image(ref), self._samples[ref]
        has_mask = self._mask is not None and self._mask in sample.files
        return ImagePair(data, sample.read(str(self._mask), ref) if has_mask else None)

    def _read_image(self, ref: str) -> bytes:
        if ref not in self._samples:
            what = f"No sample of this name was found in {self._pattern}"
            raise ImageError(what, where=ref, fix="Use a ref that `entries` lists")
        extension = self._image_of[ref]
        if extension is None:
            fix = "Add its image, or name another extension with ?image="
            raise ImageError("This sample holds no image", where=ref, fix=fix)
        return self._samples[ref].read(extension, ref)


def _image(sample: _Sample, options: WebDatasetOptions, ref: str) -> str | None:
    """The extension of a sample's image, None where it has none."""
    if options.image is not None:
        return options.image if options.image in sample.files else None
    found = [extension for extension in sample.files if f".{extension}" in IMAGE_SUFFIXES]
    if len(found) > 1:
        what = f"This sample holds several images: {', '.join(found)}"
        raise ImageError(what, where=ref, fix=f"Choose one with ?image={found[0]}")
    return found[0] if found else None


def _mask_extension(
    samples: Mapping[str, _Sample], options: WebDatasetOptions, *, where: str
) -> str | None:
    """The extension of masks: what was asked for, else the usual one that is there."""
    extensions = {extension for sample in samples.values() for extension in sample.files}
    if options.mask is None:
        return next((name for name in _MASKS if name in extensions), None)
    if options.mask not in extensions:
        fix = f"Choose one of: {nearest_names(options.mask, extensions)}"
        raise ImageError(f"No sample has a file .{options.mask}", where=where, fix=fix)
    return options.mask


def _list_entries(
    samples: Mapping[str, _Sample], options: WebDatasetOptions, *, where: str
) -> tuple[ImageEntry, ...]:
    fields = {ref: _fields(sample, ref) for ref, sample in samples.items()}
    names = list(dict.fromkeys(name for found in fields.values() for name in found))
    columns = _Columns(samples, fields, where)
    label = options.label
    if label is None and any(_LABEL in sample.files for sample in samples.values()):
        label = _LABEL
    labels = columns.read(label) if label is not None else [None] * len(samples)
    grouped = {name: columns.read(name) for name in column_names(options.group, names)}
    groups = join_groups(grouped) if grouped else [None] * len(samples)
    used = {label, *(grouped if len(grouped) == 1 else ())}
    described = [name for name in names if name not in used]
    return tuple(
        ImageEntry(
            ref=ref,
            label=label,
            group=group,
            metadata={name: fields[ref].get(name) for name in described},
        )
        for ref, label, group in zip(samples, labels, groups, strict=True)
    )


class _Columns(NamedTuple):
    """What the samples say besides their images."""

    samples: Mapping[str, _Sample]
    fields: Mapping[str, Mapping[str, str | None]]
    where: str

    def read(self, name: str) -> list[str | None]:
        """The texts of an extension, or the values of a field of ``.json``, sample by sample."""
        if any(name in sample.files for sample in self.samples.values()):
            return [
                _text(sample, name, ref) if name in sample.files else None
                for ref, sample in self.samples.items()
            ]
        if any(name in found for found in self.fields.values()):
            return [self.fields[ref].get(name) for ref in self.samples]
        known = {extension for sample in self.samples.values() for extension in sample.files}
        known.update(field for found in self.fields.values() for field in found)
        fix = f"Choose one of: {nearest_names(name, known)}"
        what = f"No sample has a file .{name}, nor a field {name!r} in its .json"
        raise ImageError(what, where=self.where, fix=fix)


def _text(sample: _Sample, extension: str, ref: str) -> str | None:
    try:
        return sample.read(extension, ref).decode().strip() or None
    except UnicodeDecodeError as failure:
        where = f"{ref}.{extension}"
        what = "This file of a sample is not UTF-8 text"
        raise ImageError(what, where=where, fix="Correct or remove it") from failure


def _fields(sample: _Sample, ref: str) -> dict[str, str | None]:
    """The fields of a sample's ``.json`` that hold one value, as text."""
    text = _text(sample, "json", ref) if "json" in sample.files else None
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as failure:
        what = "This file of a sample is not valid JSON"
        raise ImageError(what, where=f"{ref}.json", fix="Correct or remove it") from failure
    if not isinstance(found, dict):
        return {}
    return {
        name: None if value is None or value == "" else str(value)
        for name, value in found.items()
        if value is None or isinstance(value, str | int | float)
    }
