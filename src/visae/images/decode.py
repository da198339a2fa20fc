"""From the bytes of an image file to upright 8-bit RGB pixels, or a reason why not.

Every source decodes here, so that each kind of file (16-bit, transparent, CMYK, rotated by EXIF)
gives the same pixels wherever it comes from. Colour profiles are ignored, as in the pipelines that
vision models are trained with. Main names: ``decode`` for bytes, ``read_image`` for a file.
"""

import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from visae.errors import ImageError
from visae.images.pillow import (
    MAX_PIXELS,
    REPLACE,
    open_strictly,
    orientation_of,
    turn_upright,
)
from visae.images.source import LoadedImage
from visae.storage.hashing import hash_bytes

__all__ = ["Decoded", "decode", "decode_oriented", "read_file", "read_image"]

_MAX_FILE_BYTES = 2**30
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262


class Decoded(NamedTuple):
    """An image, decoded."""

    pixels: Image.Image
    """Upright, 8-bit RGB."""
    orientation: int
    """EXIF orientation that the file had, 1 to 8; 1 is upright."""


def decode(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Upright 8-bit RGB pixels of an encoded image, without metadata.

    Reads BMP, GIF, JPEG, PNG, PPM, TIFF and WebP. EXIF orientation is applied; a damaged EXIF
    block is ignored. Transparent pixels are laid on white, because cut-outs are drawn for white
    pages and the colour hidden under full transparency is arbitrary. Animations give their first
    frame. 16-bit grey is divided by 257 (a TIFF of fewer bits by its own range), floats are taken
    in 0…1; values outside are refused, never clipped.

    Args:
        data: The bytes of the file.
        where: The image's name in errors.
        max_pixels: Width times height above which the image is refused before it is decoded;
            twice ``PIL.Image.MAX_IMAGE_PIXELS`` is a limit too.

    Raises:
        ImageError: whose ``what`` is the reason: the bytes are empty, not an image, truncated,
            corrupt, too large or of pixel values without a known range.
    """
    return decode_oriented(data, where=where, max_pixels=max_pixels).pixels


def decode_oriented(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """As ``decode``, with the orientation that was applied."""
    with open_strictly(data, where=where, max_pixels=max_pixels) as image:
        image.load()
        orientation = orientation_of(image)
        return Decoded(turn_upright(_to_rgb(image, where), orientation), orientation)


def read_image(path: Path, *, where: str) -> LoadedImage:
    """One image file, decoded, with the SHA-256 of its bytes as content id.

    Raises:
        ImageError: as ``decode`` and ``read_file``.
    """
    data = read_file(path, where=where)
    return LoadedImage(hash_bytes(data), decode(data, where=where))


def read_file(path: Path, *, where: str) -> bytes:
    """The bytes of an image or mask file.

    Raises:
        ImageError: when the file is missing, cannot be opened, is not a regular file or is larger
            than 1 GiB.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("This is not a regular file", where=where, fix=REPLACE)
        if status.st_size > _MAX_FILE_BYTES:
            raise ImageError("The file is larger than 1 GiB", where=where, fix=REPLACE)
        return path.read_bytes()
    except FileNotFoundError as failure:
        fix = "Restore the file or correct the path"
        raise ImageError("The file is missing", where=where, fix=fix) from failure
    except (OSError, ValueError) as failure:
        fix = "Check the path and its permissions"
        raise ImageError("The file cannot be opened", where=where, fix=fix) from failure


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_integers(image, where)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_scale_floats(image, where)).convert("RGB")
    if image.mode == "La":  # the one mode with alpha that Pillow cannot turn into RGBA at once
        image = image.convert("LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scale_integers(image: Image.Image, where: str) -> UInt8[np.ndarray, "height width"]:
    """Deep grey as 8 bits: value · 255 / (2^bits − 1), rounded."""
    values: np.ndarray = np.asarray(image).astype(np.int64)
    bits, is_inverted = _tiff_depth(image)
    highest = 2**bits - 1
    if values.min() < 0 or values.max() > highest:
        what = f"Grey values lie outside 0 to {highest}"
        raise ImageError(what, where=where, fix="Save it as 8-bit or 16-bit grey")
    scaled: np.ndarray = ((values * 510 + highest) // (2 * highest)).astype(np.uint8)
    if is_inverted:
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return scaled


def _tiff_depth(image: Image.Image) -> tuple[int, bool]:
    """Bits that full brightness takes, and whether 0 is white, of a deep grey image."""
    tags = getattr(image, "tag_v2", {})
    bits = min(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0], 16)
    return bits, bits > 8 and tags.get(_TIFF_PHOTOMETRIC, 1) == 0


def _scale_floats(image: Image.Image, where: str) -> UInt8[np.ndarray, "height width"]:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 1):  # also true of NaN
        what = "Float values lie outside 0 to 1"
        raise ImageError(what, where=where, fix="Scale them to 0…1 or save it as 8-bit grey")
    scaled: np.ndarray = np.rint(values * 255).astype(np.uint8)
    return scaled
