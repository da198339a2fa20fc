"""Which columns of a Hugging Face dataset mean what, and what their cells hold."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from visae.errors import ImageError, VisaeError, nearest_names
from visae.images.decode import read_file
from visae.images.groups import column_names
from visae.images.hub_address import HubAddress

__all__ = ["HubColumns", "choose_columns", "stored_bytes", "value_text"]


class HubColumns(NamedTuple):
    """The columns of a dataset by what they mean."""

    image: str
    """The images."""
    mask: str | None
    """Their masks."""
    label: str | None
    """Their class names."""
    groups: tuple[str, ...]
    """What a split keeps whole."""
    metadata: tuple[str, ...]
    """Every other column that holds one value a row."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that are read as text, each once."""
        label = () if self.label is None else (self.label,)
        return tuple(dict.fromkeys([*label, *self.groups, *self.metadata]))

    @property
    def images(self) -> tuple[str, ...]:
        """The columns of images and masks."""
        return (self.image,) if self.mask is None else (self.image, self.mask)


def choose_columns(datasets: ModuleType, features: Any, address: HubAddress) -> HubColumns:
    """The columns that an address asks for, or those that can be told by their types.

    Args:
        datasets: The package.
        features: Name and type of every column.
        address: Where the dataset is, with the options that name columns.

    Raises:
        ImageError: when a column is missing or of another kind, or a choice is left open.
    """
    kinds = {str(name): kind for name, kind in features.items()}
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    options = address.options
    if options.mask is not None and options.mask not in images:
        fix = f"Choose one of: {nearest_names(options.mask, images)}"
        raise ImageError(f"No column of images is called {options.mask}", where=address, fix=fix)
    label = _label_column(datasets, kinds, address)
    groups = column_names(options.group, list(kinds))
    for name in (*(() if label is None else (label,)), *groups):
        _check_values(datasets, kinds, name, address)
    used = {label, *(groups if len(groups) == 1 else ())}
    return HubColumns(
        image=_image_column([name for name in images if name != options.mask], kinds, address),
        mask=options.mask,
        label=label,
        groups=groups,
        metadata=tuple(
            name
            for name, kind in kinds.items()
            if name not in used and _holds_values(datasets, kind)
        ),
    )


def value_text(datasets: ModuleType, kind: Any, value: Any) -> str | None:
    """A value as text, a class index as its name; None where there is no value."""
    if value is None or value == "":
        return None
    if isinstance(kind, datasets.ClassLabel):
        return str(kind.names[value]) if value >= 0 else None
    return str(value)


def stored_bytes(cell: Mapping[str, Any] | None, where: str) -> bytes | None:
    """The bytes of an encoded image, None where a cell is empty.

    Raises:
        ImageError: when the cell names a file that cannot be read.
        VisaeError: when it names a file elsewhere, and the way there breaks off.
    """
    if cell is None:
        return None
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    path = cell.get("path")
    if path is None:
        return None
    return _remote_bytes(path, where) if "://" in path else read_file(Path(path), where=where)


def _remote_bytes(address: str, where: str) -> bytes:
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(address, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as failure:
        fix = "Remove the row from the dataset"
        raise ImageError("The file is missing", where=where, fix=fix) from failure
    except (OSError, RuntimeError, ValueError) as failure:
        what = f"The file {address} cannot be read"
        fix = "Run the same command again: it goes on from what was finished"
        raise VisaeError(what, where=where, fix=fix) from failure


def _image_column(images: list[str], kinds: Mapping[str, Any], address: HubAddress) -> str:
    asked = address.options.image
    if asked is None and len(images) == 1:
        return images[0]
    if asked is not None and asked in images:
        return asked
    choice = f"none is called {asked}" if asked is not None else "a source needs exactly one"
    what = f"This dataset has {len(images)} columns of images, {', '.join(images)}; {choice}"
    if not images:
        what = f"This dataset has no column of images among {', '.join(kinds)}"
    fix = "Choose one with ?image=COLUMN, name masks with ?mask=COLUMN, or take another dataset"
    raise ImageError(what, where=address, fix=fix)


def _label_column(
    datasets: ModuleType, kinds: Mapping[str, Any], address: HubAddress
) -> str | None:
    if address.options.label is not None:
        return address.options.label
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    if len(classes) > 1:
        what = f"This dataset has several columns of class names: {', '.join(classes)}"
        raise ImageError(what, where=address, fix="Choose one with ?label=COLUMN")
    return classes[0] if classes else None


def _check_values(
    datasets: ModuleType, kinds: Mapping[str, Any], name: str, address: HubAddress
) -> None:
    if name not in kinds:
        fix = f"Choose one of: {nearest_names(name, kinds)}"
        raise ImageError(f"This dataset has no column {name!r}", where=address, fix=fix)
    if not _holds_values(datasets, kinds[name]):
        fix = "Choose a column of text, numbers or class names"
        what = f"Column {name!r} holds {kinds[name]}, not one value a row"
        raise ImageError(what, where=address, fix=fix)


def _holds_values(datasets: ModuleType, kind: Any) -> bool:
    """Whether a type is one value that text can say."""
    if isinstance(kind, datasets.ClassLabel):
        return True
    return isinstance(kind, datasets.Value) and "binary" not in kind.dtype
