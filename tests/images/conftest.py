"""Tiny images, encoded and on disk."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """The bytes of an image in some format."""

    def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return encode_image


@pytest.fixture
def sent() -> Callable[[Any], Any]:
    """A source as another process gets it."""
    return lambda source: pickle.loads(pickle.dumps(source))  # noqa: S301


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Write a small PNG (whatever its suffix), distinct for each seed."""

    def write(path: Path, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
        return path

    return write
