"""The photographs that scikit-image and scikit-learn carry, written without a download."""

import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from visae.demo.photographs import write_photographs
from visae.errors import ImageError

NAMES = {"astronaut", "cat", "coffee", "flower", "motorcycle", "pagoda", "rocket"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage", reason="scikit-image is not installed")

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a connection was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return write_photographs(tmp_path_factory.mktemp("demo") / "photographs")


def test_every_photograph_is_a_colour_image(folder: Path) -> None:
    files = sorted(folder.glob("*.png"))
    assert {file.stem for file in files} == NAMES
    for file in files:
        with Image.open(file) as image:
            assert image.mode == "RGB"
            assert min(image.size) >= 300
            pixels = np.asarray(image).astype(float)
        assert (pixels.max(axis=2) - pixels.min(axis=2)).mean() > 10  # neither grey nor blank


def test_pixels_are_unaltered(folder: Path) -> None:
    from skimage import data

    with Image.open(folder / "cat.png") as cat, Image.open(folder / "pagoda.png") as pagoda:
        assert np.array_equal(np.asarray(cat), data.chelsea())
        assert np.array_equal(np.asarray(pagoda), load_sample_image("china.jpg"))


def test_every_photograph_is_credited(folder: Path) -> None:
    text = (folder / "CREDITS.txt").read_text(encoding="utf-8")
    headings = {line.removesuffix(".png") for line in text.splitlines() if line.endswith(".png")}
    assert headings == NAMES
    assert text.count("Carried by") + text.count("carries it") == len(NAMES)


def test_missing_scikit_image_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImageError, match=r"pip install 'visae\[demo\]'"):
        write_photographs(tmp_path / "photographs")
    assert not (tmp_path / "photographs").exists()
