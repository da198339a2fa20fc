"""Hugging Face datasets as a source: ``hf://owner/dataset:split`` or a dataset saved on disk.

A hub that does not answer within seconds is left alone: a dataset that was downloaded before opens
from its copy on this machine, any other is an error at once.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, final

import huggingface_hub.constants

from visae.errors import ImageError, nearest_names
from visae.images.decode import decode, read_image
from visae.images.location import is_folder, is_there, join_options, nearest_siblings, split_options
from visae.images.source import ImageEntry, LoadedImage, row_number
from visae.storage.hashing import hash_bytes
from visae.storage.hub import hub_access
from visae.storage.records import from_plain

__all__ = ["HubAddress", "HubImages", "HubOptions"]

_FORM = "Write hf://owner/dataset:split, or hf:FOLDER for a dataset on this machine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Which part of a dataset to use; the options of ``hf://owner/dataset:split?config=160px``."""

    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Commit, tag or branch of the dataset; unset: its newest state."""
    image: str | None = None
    """Column of images; unset: the only one of that type."""
    label: str | None = None
    """Column of labels; unset: the only one of class names, or no labels."""
    group: str | None = None
    """Column of groups that a split keeps whole; unset: none."""


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


@final
class HubImages:
    """The rows of a dataset, in its order; refs are row numbers ("0", "1", …).

    Integer labels of class type become their names, −1 becomes no label. A content id is the
    SHA-256 of the encoded bytes that the dataset stores.

    Args:
        location: ``hf://owner/dataset[:split][?options]``, or ``hf:FOLDER[:split][?options]`` for
            a folder written by ``save_to_disk`` or any that ``load_dataset`` reads.

    Raises:
        ImageError: when the package ``datasets`` is not installed, the hub cannot be reached, or
            there is no such dataset, split or column.
    """

    def __init__(self, location: str) -> None:
        self._address = HubAddress.parse(location)
        datasets = _import_datasets()
        rows = _load_rows(datasets, self._address)
        self._image = _image_column(datasets, rows.features, self._address)
        label = _label_column(datasets, rows.features, self._address)
        labels = _texts(datasets, rows, label, self._address)
        groups = _texts(datasets, rows, self._address.options.group, self._address)
        pairs = zip(labels, groups, strict=True)
        self._entries = tuple(
            ImageEntry(ref=str(i), label=name, group=group) for i, (name, group) in enumerate(pairs)
        )
        encoded = datasets.Image(decode=False)
        self._rows = rows.select_columns([self._image]).cast_column(self._image, encoded)

    @property
    def location(self) -> str:
        """The location, with an absolute path where it is a folder."""
        return str(self._address)

    @property
    def entries(self) -> tuple[ImageEntry, ...]:
        """Every row, in the order of the dataset."""
        return self._entries

    def load(self, ref: str) -> LoadedImage:
        """Read the image of one row.

        Raises:
            ImageError: when there is no such row, it holds no image, or it cannot be read.
        """
        row = row_number(ref, len(self._entries), where=self.location)
        image = self._rows[row][self._image] or {}
        if image.get("bytes") is not None:
            data = image["bytes"]
            return LoadedImage(hash_bytes(data), decode(data, where=ref))
        if image.get("path") is not None:
            return read_image(Path(image["path"]), where=ref)
        fix = "Remove the row from the dataset"
        raise ImageError("The row holds no image", where=ref, fix=fix)


def _parse_local(text: str, options: HubOptions) -> HubAddress:
    parent, slash, last = text.rpartition("/")
    name, _, split = (last, "", "") if is_folder(Path(text)) else last.partition(":")
    folder = Path(parent + slash + name).absolute()
    if not is_folder(folder):
        fix = f"{_FORM}; {nearest_siblings(folder)}"
        raise ImageError("There is no such folder", where=folder, fix=fix)
    return HubAddress(name=folder.as_posix(), split=split or None, is_local=True, options=options)


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as failure:
        what = "Hugging Face datasets need the package datasets, which is not installed"
        raise ImageError(what, fix="Run pip install 'visae[datasets]'") from failure
    return datasets  # type: ignore[no-any-return]


def _load_rows(datasets: ModuleType, address: HubAddress) -> Any:
    """The ``datasets.Dataset`` at an address; the package itself refuses one without rows."""
    if not address.is_local:
        return _load_from_hub(datasets, address)
    with _dataset_errors(datasets, address):
        if _is_saved(Path(address.name)):
            return _choose_split(datasets, datasets.load_from_disk(address.name), address)
        return _load(datasets, address)


def _load_from_hub(datasets: ModuleType, address: HubAddress) -> Any:
    if is_there(Path(address.name)):
        # load_dataset would take the folder without a word.
        what = "The working folder holds a folder of this dataset's name"
        fix = f"Write hf:{address.name} for the folder, or work in another place for the hub"
        raise ImageError(what, where=address, fix=fix)
    was_offline = datasets.config.HF_HUB_OFFLINE
    with hub_access() as answers, _dataset_errors(datasets, address):
        datasets.config.HF_HUB_OFFLINE = was_offline or not answers
        try:
            return _load(datasets, address)
        except OSError as failure:
            if not datasets.config.HF_HUB_OFFLINE:
                raise
            raise _no_hub(address, asked_to_stay_offline=was_offline) from failure
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline


def _load(datasets: ModuleType, address: HubAddress) -> Any:
    return datasets.load_dataset(
        address.name,
        address.options.config,
        split=address.split or "train",
        revision=address.options.revision,
    )


def _no_hub(address: HubAddress, *, asked_to_stay_offline: bool) -> ImageError:
    if asked_to_stay_offline:
        what = "This dataset has no copy on this machine, and HF_HUB_OFFLINE forbids to download it"
        return ImageError(what, where=address, fix="Unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE")
    endpoint = huggingface_hub.constants.ENDPOINT
    what = f"The hub at {endpoint} cannot be reached, and this dataset has no copy on this machine"
    fix = "Check the network, or HF_ENDPOINT where you use a mirror; or give a folder of images"
    return ImageError(what, where=address, fix=fix)


@contextlib.contextmanager
def _dataset_errors(datasets: ModuleType, address: HubAddress) -> Iterator[None]:
    try:
        yield
    except (
        LookupError,
        OSError,
        RuntimeError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as failure:
        lines = str(failure).strip().splitlines() or [type(failure).__name__]
        what = f"This dataset cannot be loaded: {lines[0].rstrip('.')[:200]}"
        fix = "Check its name, split, ?config= and ?revision="
        raise ImageError(what, where=address, fix=fix) from failure


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _choose_split(datasets: ModuleType, saved: Any, address: HubAddress) -> Any:
    if not isinstance(saved, datasets.DatasetDict):
        if address.split is not None:
            what = f"This saved dataset has no splits, so none called {address.split}"
            raise ImageError(what, where=address, fix="Leave the split out")
        return saved
    split = address.split or "train"
    if split not in saved:
        fix = f"Choose one of: {nearest_names(split, saved)}"
        raise ImageError(f"This dataset has no split {split}", where=address, fix=fix)
    return saved[split]


def _image_column(datasets: ModuleType, features: Any, address: HubAddress) -> str:
    asked = address.options.image
    images = [str(name) for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if asked is None and len(images) == 1:
        return images[0]
    if asked is not None and asked in images:
        return asked
    choice = f"none is called {asked}" if asked is not None else "a source needs exactly one"
    what = f"This dataset has {len(images)} columns of images, {', '.join(images)}; {choice}"
    if not images:
        what = f"This dataset has no column of images among {', '.join(features)}"
    raise ImageError(what, where=address, fix="Choose one with ?image=COLUMN, or another dataset")


def _label_column(datasets: ModuleType, features: Any, address: HubAddress) -> str | None:
    if address.options.label is not None:
        return address.options.label
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(classes) > 1:
        what = f"This dataset has several columns of class names: {', '.join(classes)}"
        raise ImageError(what, where=address, fix="Choose one with ?label=COLUMN")
    return classes[0] if classes else None


def _texts(
    datasets: ModuleType, rows: Any, column: str | None, where: HubAddress
) -> Sequence[str | None]:
    """A column as text, class indices as names; all None where no column is asked for."""
    if column is None:
        return [None] * len(rows)
    if column not in rows.features:
        fix = f"Choose one of: {nearest_names(column, rows.features)}"
        raise ImageError(f"This dataset has no column {column!r}", where=where, fix=fix)
    kind = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    if isinstance(kind, datasets.ClassLabel):
        return [kind.names[v] if v is not None and v >= 0 else None for v in values]
    if not isinstance(kind, datasets.Value):
        fix = "Choose a column of text, numbers or class names"
        what = f"Column {column!r} holds {kind}, not one value a row"
        raise ImageError(what, where=where, fix=fix)
    return [None if value is None or value == "" else str(value) for value in values]
