"""Opening Hugging Face datasets: rows in any order, or a stream of them.

A hub that does not answer within seconds is left alone: a dataset that was downloaded before opens
from its copy on this machine, any other is an error at once.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants

from visae.errors import ImageError, nearest_names
from visae.images.hub_address import HubAddress
from visae.images.location import is_there
from visae.storage.hub import hub_access

__all__ = ["import_datasets", "load_rows", "load_stream"]


def import_datasets() -> ModuleType:
    """The package ``datasets``.

    Raises:
        ImageError: when it is not installed, naming the extra that installs it.
    """
    try:
        import datasets
    except ImportError as failure:
        what = "Hugging Face datasets need the package datasets, which is not installed"
        raise ImageError(what, fix="Run pip install 'visae[datasets]'") from failure
    return datasets  # type: ignore[no-any-return]


def load_rows(datasets: ModuleType, address: HubAddress) -> Any:
    """The ``datasets.Dataset`` at an address; the package itself refuses one without rows.

    Raises:
        ImageError: when there is no such dataset or split, it has fewer rows than asked for, or the
            hub cannot be reached.
    """
    rows = _load_all(datasets, address)
    n_rows = address.options.n_rows
    if n_rows is None:
        return rows
    if n_rows > len(rows):
        what = f"This dataset has {len(rows)} rows, fewer than ?n={n_rows}"
        raise ImageError(what, where=address, fix="Ask for fewer, or leave ?n= out")
    return rows.select(range(n_rows))


def load_stream(datasets: ModuleType, address: HubAddress) -> Any:
    """The ``datasets.IterableDataset`` at an address, nothing of it downloaded yet.

    Raises:
        ImageError: as ``load_rows``, or when the dataset is a saved one.
    """
    if not address.is_local:
        return _load_from_hub(datasets, address)
    if _is_saved(Path(address.name)):
        what = "A saved dataset is on this machine, to be read in any order"
        raise ImageError(what, where=address, fix="Leave ?streaming=1 out")
    with _dataset_errors(datasets, address):
        return _load(datasets, address)


def _load_all(datasets: ModuleType, address: HubAddress) -> Any:
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
        streaming=address.options.streaming is not None,
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
