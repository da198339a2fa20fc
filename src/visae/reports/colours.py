"""The colours of heat maps: one perceptually uniform map (inferno), the same wherever they appear.

A patch at which a feature does not fire is left clear; one at which it fires is coloured by its
activation over ``peak``, and the more opaque the stronger it is. The image below shows through.
"""

import base64
import io

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

__all__ = ["as_data_uri", "heat_colours", "hex_colours"]

_FIRST, _LAST = 0.35, 0.95
_FAINTEST, _STRONGEST = 0.45, 0.85


def heat_colours(
    grid: Float[np.ndarray, "row column"], *, peak: float
) -> UInt8[np.ndarray, "row column 4"]:
    """Red, green, blue and opacity of every patch; clear where the activation is not above 0.

    ``peak`` is the activation that has the strongest colour; larger ones look like it.
    """
    share = np.clip(grid / peak, 0.0, 1.0) if peak > 0 else np.zeros_like(grid)
    colours = mpl.colormaps["inferno"](_FIRST + (_LAST - _FIRST) * share)
    colours[..., 3] = np.where(share > 0, _FAINTEST + (_STRONGEST - _FAINTEST) * share, 0.0)
    result: np.ndarray = np.rint(colours * 255).astype(np.uint8)
    return result


def hex_colours(n: int) -> list[str]:
    """The colours of ``n`` equal steps from 0 to the peak, for legends and histograms."""
    middles = (np.arange(n) + 0.5) / n
    rgb = mpl.colormaps["inferno"](_FIRST + (_LAST - _FIRST) * middles)[:, :3]
    return [mpl.colors.to_hex(colour) for colour in rgb]


def as_data_uri(colours: UInt8[np.ndarray, "row column 4"]) -> str:
    """Colours as a PNG with a pixel a patch, in a data URI; a browser scales it to the image."""
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
