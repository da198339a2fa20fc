"""From the bytes of a mask file to one class value a pixel, lying on its upright image.

A mask holds values, never colours: a palette's indices or grey levels, as stored. Main names:
``decode_mask``, ``MaskTurn``.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int32
from PIL import Image, ImageFile

from visae.errors import ImageError
from visae.images.decode import Decoded
from visae.images.pillow import open_strictly, orientation_of, turn_upright

__all__ = ["MaskTurn", "decode_mask"]

MaskTurn = Literal["image", "both"]

_SAVE_AS = "Save it as PNG with the class values as palette indices or as 8-bit or 16-bit grey"
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# Pillow spreads grey of few bits over 0…255; this is what one stored step becomes.
_GREY_STEP = {"L;2": 85, "L;4": 17}
_HIGHEST_VALUE = 2**16 - 1
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0


def decode_mask(
    data: bytes, image: Decoded, *, where: str, turn: MaskTurn | None = None
) -> Int32[np.ndarray, "height width"]:
    """The class value of each pixel of an upright image.

    Reads PNG and TIFF of one channel, 1 to 16 bits deep (TIFF also 32-bit integers). A mask with an
    EXIF orientation of its own is turned by it. One without, of an image with one, says nothing
    about which way up it is: it is refused unless ``turn`` tells.

    Args:
        data: The bytes of the mask's file.
        image: What the mask is of.
        where: The image's name in errors.
        turn: ``both`` where the image's orientation goes for its mask, ``image`` where the mask was
            drawn on the upright image.

    Raises:
        ImageError: when the mask is damaged, holds colours, is of a lossy format or of another size
            than its image, or may lie either way up.
    """
    where = f"mask of {where}"
    with open_strictly(data, where=where) as mask:
        _check_kind(mask, where)
        values = _values(mask)
        orientation = _turn(orientation_of(mask), image.orientation, turn, where)
        upright = turn_upright(values, orientation)
    if upright.size != image.pixels.size:
        sizes = [f"{one.width} × {one.height}" for one in (upright, image.pixels)]
        what = f"The mask is {sizes[0]} pixels, its image {sizes[1]}"
        raise ImageError(what, where=where, fix="Give the mask that belongs to this image")
    found = np.asarray(upright, dtype=np.int32)
    if found.min() < 0 or found.max() > _HIGHEST_VALUE:
        what = f"The mask holds class values from {found.min()} to {found.max()}"
        raise ImageError(what, where=where, fix=f"Use values from 0 to {_HIGHEST_VALUE}")
    return found


def _check_kind(mask: Image.Image, where: str) -> None:
    if mask.format not in ("PNG", "TIFF"):
        what = f"The mask is {mask.format}, which need not keep class values as they are"
        raise ImageError(what, where=where, fix=_SAVE_AS)
    if mask.mode not in _MODES:
        what = f"The mask holds colours or fractions ({mask.mode}), not class values"
        raise ImageError(what, where=where, fix=_SAVE_AS)
    if getattr(mask, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ImageError("The mask stores its grey inverted", where=where, fix=_SAVE_AS)


def _values(mask: ImageFile.ImageFile) -> Image.Image:
    """The values as they are stored, as 32-bit integers."""
    arguments = mask.tile[0].args or ""  # gone once the pixels are decoded
    raw_mode = arguments if isinstance(arguments, str) else str(arguments[0])
    step = next((step for raw, step in _GREY_STEP.items() if raw_mode.startswith(raw)), 1)
    return Image.fromarray(np.asarray(mask).astype(np.int32) // step)


def _turn(own: int, of_image: int, turn: MaskTurn | None, where: str) -> int:
    """The orientation to undo: the mask's own, or its image's where it is that of both."""
    if own != 1 or of_image == 1 or turn == "image":
        return own
    if turn == "both":
        return of_image
    what = "The image is turned by its EXIF orientation and its mask has none, so either may fit"
    fix = (
        "Say with ?exif=both that the mask is to be turned too, or with ?exif=image that it is not"
    )
    raise ImageError(what, where=where, fix=fix)
