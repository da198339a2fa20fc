"""From the bytes of an image file to upright 8-bit RGB pixels, or a reason why not.

Every source decodes here, so that each kind of file (16-bit, transparent, CMYK, rotated by EXIF)
gives the same pixels wherever it comes from. Colour profiles are ignored, as in the pipelines that
vision models are trained with. Main names: ``decode`` for bytes, ``read_image`` for a file.
"""

import contextlib
import io
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from visae.errors import ImageError
from visae.images.source import LoadedImage
from visae.storage.hashing import hash_bytes

__all__ = ["decode", "read_image"]

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_FILE_BYTES = 2**30
_REPLACE = "Replace or remove this image"
_DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262

# What undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, *, where: str, max_pixels: int = 100_000_000) -> Image.Image:
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
    if not data:
        raise ImageError("The file is empty", where=where, fix=_REPLACE)
    with _strict_pillow:
        image = _open(data, where)
        if image.width * image.height > max_pixels:
            size = f"{where}, {image.width} × {image.height} pixels"
            fix = f"Shrink it to at most {max_pixels} pixels or remove it"
            raise ImageError("The image is too large", where=size, fix=fix)
        with _damage_as_image_error(where):
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image, where)
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info = {}  # an orientation left here would be applied again by the next reader
    return upright


def read_image(path: Path, *, where: str) -> LoadedImage:
    """One image file, decoded, with the SHA-256 of its bytes as content id.

    Raises:
        ImageError: as ``decode``, or when the file is missing, cannot be opened, is not a regular
            file or is larger than 1 GiB.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("This is not a regular file", where=where, fix=_REPLACE)
        if status.st_size > _MAX_FILE_BYTES:
            raise ImageError("The file is larger than 1 GiB", where=where, fix=_REPLACE)
        data = path.read_bytes()
    except FileNotFoundError as failure:
        fix = "Restore the file or correct the path"
        raise ImageError("The file is missing", where=where, fix=fix) from failure
    except (OSError, ValueError) as failure:
        fix = "Check the path and its permissions"
        raise ImageError("The file cannot be opened", where=where, fix=fix) from failure
    return LoadedImage(hash_bytes(data), decode(data, where=where))


def _open(data: bytes, where: str) -> Image.Image:
    """The image with its header read and its pixels not yet decoded."""
    try:
        with _damage_as_image_error(where):
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as failure:
        fix = "Shrink it or remove it"
        raise ImageError("The image is too large", where=where, fix=fix) from failure


@contextlib.contextmanager
def _damage_as_image_error(where: str) -> Iterator[None]:
    """Turn whatever Pillow raises on damaged bytes into an ``ImageError`` with a stable reason."""
    try:
        yield
    except UnidentifiedImageError as failure:
        what = "This is not an image, or its header is damaged"
        fix = f"Give one of {', '.join(_FORMATS)}, or remove it"
        raise ImageError(what, where=where, fix=fix) from failure
    except _DAMAGE as failure:
        cut = isinstance(failure, EOFError) or "truncated" in str(failure).lower()
        what = "The image is truncated" if cut else "The image is corrupt"
        raise ImageError(what, where=where, fix=_REPLACE) from failure


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is absent or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


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


class _StrictPillow:
    """While any decode runs, Pillow neither warns nor accepts truncated files.

    Both are settings of the whole process: the first of several threads sets them, the last one
    restores what was there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._restore.enter_context(_strict_settings())
            self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._restore.close()


@contextlib.contextmanager
def _strict_settings() -> Iterator[None]:
    accepts_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = accepts_truncated


_strict_pillow = _StrictPillow()
