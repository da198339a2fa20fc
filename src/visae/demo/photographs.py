"""Photographs for the demo's pictures, out of packages that are installed anyway.

scikit-image and scikit-learn carry a few photographs inside their wheels. ``write_photographs``
copies them to a folder, so nothing is downloaded, together with what these packages say about
their origin and licence.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from visae.errors import ImageError
from visae.storage.atomic import write_bytes, write_text

__all__ = ["write_photographs"]

_CREDITS = {
    "astronaut": "Eileen Collins, from the NASA Great Images database (flic.kr/p/r9qvLn). "
    "No known copyright restrictions, released into the public domain. Carried by scikit-image.",
    "cat": "Chelsea the cat, by Stefan van der Walt. CC0. Carried by scikit-image.",
    "coffee": "Coffee cup, by Rachel Michetti, courtesy of Pikolo Espresso Bar. CC0. "
    "Carried by scikit-image.",
    "flower": "flower.jpg (flickr.com/photos/vultilion/6056698931). CC BY 2.0 "
    "(creativecommons.org/licenses/by/2.0). scikit-learn, which carries it, names danielbuechele "
    "as its author and links to vultilion.",
    "motorcycle": "Left image of a pair of the Middlebury 2014 stereo benchmark (D. Scharstein "
    "and others, High-resolution stereo datasets with subpixel-accurate ground truth, "
    "GCPR 2014). scikit-image, which carries it, states no licence.",
    "pagoda": "china.jpg, by danielbuechele (flickr.com/photos/danielbuechele/6061409035). "
    "CC BY 2.0 (creativecommons.org/licenses/by/2.0). Carried by scikit-learn.",
    "rocket": "Launch of DSCOVR on Falcon 9, by SpaceX "
    "(flickr.com/photos/spacexphotos/16511594820). Released in the public domain. "
    "Carried by scikit-image.",
}
"""Photograph → what the package that carries it states about origin and licence."""


def write_photographs(folder: Path) -> Path:
    """A folder with seven colour photographs as ``NAME.png`` and their ``CREDITS.txt``.

    Raises:
        ImageError: when scikit-image is not installed.
        StoreError: when the folder cannot be written.
    """
    for name, pixels in _read_photographs().items():
        write_bytes(folder / f"{name}.png", _png(pixels))
    entries = [f"{name}.png\n  {credit}\n" for name, credit in _CREDITS.items()]
    write_text(
        folder / "CREDITS.txt",
        "\n".join(["Photographs of the demo, pixels unaltered.\n", *entries]),
    )
    return folder


def _read_photographs() -> dict[str, Any]:
    """Pixels (height, width, 3) of each photograph, 8-bit."""
    try:
        from skimage import data
    except ModuleNotFoundError as failure:
        raise ImageError(
            "The demo's photographs come with scikit-image, which is not installed",
            where="package scikit-image",
            fix="Run: pip install 'visae[demo]'",
        ) from failure
    from sklearn.datasets import load_sample_image

    carried: Any = data  # its functions have no annotations
    return {
        "astronaut": carried.astronaut(),
        "cat": carried.chelsea(),
        "coffee": carried.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "motorcycle": carried.stereo_motorcycle()[0],
        "pagoda": load_sample_image("china.jpg"),
        "rocket": carried.rocket(),
    }


def _png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
