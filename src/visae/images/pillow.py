"""Pillow made strict: bytes become an open image, or one of a few stable reasons why not.

Colour images (``visae.images.decode``) and masks (``visae.images.mask_decode``) are both opened
here. Main names: ``open_strictly``, ``orientation_of``, ``turn_upright``.
"""

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from visae.errors import ImageError

__all__ = ["MAX_PIXELS", "REPLACE", "open_strictly", "orientation_of", "turn_upright"]

MAX_PIXELS = 100_000_000
REPLACE = "Replace or remove this image"
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
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


@contextlib.contextmanager
def open_strictly(
    data: bytes, *, where: str, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFile.ImageFile]:
    """The image in some bytes, its pixels not yet decoded; damage met in the block is a reason too.

    Raises:
        ImageError: whose ``what`` is the reason: the bytes are empty, not an image, truncated,
            corrupt or too large.
    """
    if not data:
        raise ImageError("The file is empty", where=where, fix=REPLACE)
    with _strict_pillow:
        image = _open(data, where)
        if image.width * image.height > max_pixels:
            size = f"{where}, {image.width} × {image.height} pixels"
            fix = f"Shrink it to at most {max_pixels} pixels or remove it"
            raise ImageError("The image is too large", where=size, fix=fix)
        with _damage_as_image_error(where):
            yield image


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is absent or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image as it is to be shown, without the metadata that say so."""
    turn = _UPRIGHT.get(orientation)
    upright = image if turn is None else image.transpose(turn)
    upright.info = {}  # an orientation left here would be applied again by the next reader
    return upright


def _open(data: bytes, where: str) -> ImageFile.ImageFile:
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
        raise ImageError(what, where=where, fix=REPLACE) from failure


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
