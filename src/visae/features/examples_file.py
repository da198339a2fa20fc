"""The file ``examples.safetensors``: for every band, image rows and maxima of every feature.

``BAND.images`` (int32, feature × rank, −1 where there are fewer) and ``BAND.max`` (float32).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from visae.errors import FeatureIndexError
from visae.features.examples import BandTable
from visae.features.record import BANDS, Band
from visae.storage.tensors import FileRef, read_tensors, write_tensors

__all__ = ["example_rows", "read_examples", "write_examples"]

_FIX = "Delete it and run visae index again, which makes what is missing"


def write_examples(folder: Path, name: str, bands: Mapping[Band, BandTable]) -> FileRef:
    """Write the examples of every band, atomically."""
    tensors = {}
    for band in BANDS:
        tensors[f"{band}.images"] = bands[band].images.int()
        tensors[f"{band}.max"] = bands[band].maxima
    return write_tensors(folder, name, tensors)


def read_examples(path: Path, feature: int) -> dict[Band, list[tuple[int, float]]]:
    """Image row and maximum of one feature's examples, read without those of the others.

    Raises:
        FeatureIndexError: when the file is missing or damaged.
    """
    found: dict[Band, list[tuple[int, float]]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for band in BANDS:
                images = file.get_slice(f"{band}.images")[feature].tolist()
                maxima = file.get_slice(f"{band}.max")[feature].tolist()
                rows = zip(images, maxima, strict=True)
                found[band] = [(image, largest) for image, largest in rows if image >= 0]
    except (OSError, SafetensorError) as failure:
        what = f"The examples cannot be read: {failure}"
        raise FeatureIndexError(what, where=path, fix=_FIX) from failure
    return found


def example_rows(path: Path) -> list[int]:
    """Every image row that serves as an example of some feature, ascending.

    Raises:
        FeatureIndexError: when the file is missing or damaged.
    """
    tensors = read_tensors(path, error=FeatureIndexError)
    rows = np.unique(np.concatenate([tensors[f"{band}.images"].numpy() for band in BANDS]))
    return [int(row) for row in rows if row >= 0]
