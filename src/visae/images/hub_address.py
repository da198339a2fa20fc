"""Locations of Hugging Face datasets: ``hf://owner/dataset:split`` or ``hf:FOLDER``."""

import dataclasses
from pathlib import Path
from typing import Literal

from visae.errors import ImageError
from visae.images.location import is_folder, join_options, nearest_siblings, split_options
from visae.images.masks import MaskOptions
from visae.storage.records import from_plain

__all__ = ["HubAddress", "HubOptions"]

_FORM = "Write hf://owner/dataset:split, or hf:FOLDER for a dataset on this machine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions(MaskOptions):
    """Which part of a dataset to use; the options of ``hf://owner/dataset:split?config=160px``."""

    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Commit, tag or branch of the dataset; unset: its newest state."""
    image: str | None = None
    """Column of images; unset: the only one of that type that is no mask."""
    label: str | None = None
    """Column of labels; unset: the only one of class names, or no labels."""
    group: str | None = None
    """Columns of groups that a split keeps whole, joined by commas; unset: none."""
    mask: str | None = None
    """Column of masks; unset: none."""
    streaming: Literal["1"] | None = None
    """1 to read rows as they arrive, without downloading the dataset first."""
    n: str | None = None
    """Number of rows to use, from the first on; unset: all."""

    @property
    def n_rows(self) -> int | None:
        """Number of rows to use, None for all.

        Raises:
            ImageError: when it is not a whole number above 0.
        """
        if self.n is None:
            return None
        if not (self.n.isascii() and self.n.isdecimal() and 0 < int(self.n[:19]) < 10**18):
            raise ImageError(f"?n={self.n} is no number of rows", fix="Write it as in ?n=10000")
        return int(self.n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubAddress:
    """A location, taken apart."""

    name: str
    """``owner/dataset``, or the absolute path of a folder."""
    split: str | None
    """Name or slice of the split; unset: train, or all of a saved dataset without splits."""
    is_local: bool
    """Whether ``name`` is a folder."""
    options: HubOptions
    """Configuration, revision and columns."""

    @classmethod
    def parse(cls, location: str) -> "HubAddress":
        """The address that a location stands for.

        Raises:
            ImageError: when the location has another form, an unknown option, or names a folder
                that is missing.
        """
        address, given = split_options(location)
        if "classes" in given:
            given["classes"] = Path(given["classes"]).absolute().as_posix()
        options = from_plain(HubOptions, given, where=location, error=ImageError)
        if not address.startswith("hf://"):
            return _parse_local(address.removeprefix("hf:"), options)
        name, _, split = address.removeprefix("hf://").partition(":")
        if name.count("/") > 1 or not all(name.split("/")):
            raise ImageError("This is no dataset of the hub", where=location, fix=_FORM)
        return cls(name=name, split=split or None, is_local=False, options=options)

    def __str__(self) -> str:
        """The location that parses to this address."""
        scheme = "hf:" if self.is_local else "hf://"
        split = f":{self.split}" if self.split else ""
        return join_options(f"{scheme}{self.name}{split}", dataclasses.asdict(self.options))


def _parse_local(text: str, options: HubOptions) -> HubAddress:
    parent, slash, last = text.rpartition("/")
    name, _, split = (last, "", "") if is_folder(Path(text)) else last.partition(":")
    folder = Path(parent + slash + name).absolute()
    if not is_folder(folder):
        fix = f"{_FORM}; {nearest_siblings(folder)}"
        raise ImageError("There is no such folder", where=folder, fix=fix)
    return HubAddress(name=folder.as_posix(), split=split or None, is_local=True, options=options)
