"""From an image to the pixels a model sees, in two steps so that the second can be shown.

``view`` resizes and crops to exactly what the model looks at (heat maps are drawn on it), and
``mask_view`` does the same to a mask of classes; ``pixels`` normalises views into a batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from visae.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Interpolation", "Preprocessing"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_MAX_PIXELS = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model's input is made; travels with stores, SAEs and indexes."""

    size: tuple[int, int]
    """Height and width of the input in pixels."""
    crop_share: float = 1.0
    """Share of the scaled image's shorter side that the centre crop keeps."""
    crop: Literal["center", "squash"] = "center"
    """Keep the aspect ratio while scaling, or squash the image; either is then cropped."""
    odd_margin: Literal["nearest", "down"] = "nearest"
    """How half of an odd margin around the crop is rounded: as torchvision or as transformers."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter of the resize."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from channels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channels are divided by this after the mean is subtracted."""

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 0 < self.crop_share <= 1 or min(self.std) <= 0:
            raise ConfigError(
                "size and std must be positive and crop_share in (0, 1]",
                where=f"size {self.size}, crop_share {self.crop_share}, std {self.std}",
                fix="Correct the preprocessing",
            )

    def view(self, image: "Image.Image") -> "Image.Image":
        """The part of an RGB image that the model sees, at the size it sees it.

        The image is scaled until it just covers ``size / crop_share`` (squashed to exactly that
        with ``squash``), then cropped at the centre: timm's evaluation transform, pixel by pixel.

        Raises:
            ImageError: when the image is so elongated that scaling it would fill the memory.
        """
        return self._scale_and_crop(image, self.interpolation)

    def mask_view(self, mask: "Image.Image") -> "Image.Image":
        """The part of a mask that lies on ``view`` of its image, value by value.

        The geometry is that of ``view``; each pixel takes the value at its centre, so that no value
        arises that the mask does not hold.

        Raises:
            ImageError: as ``view``.
        """
        return self._scale_and_crop(mask, "nearest")

    def _scale_and_crop(self, image: "Image.Image", interpolation: Interpolation) -> "Image.Image":
        from PIL import Image

        height, width = self.size
        rows, columns = self._scaled_size(image.height, image.width)
        if rows * columns > _MAX_PIXELS:
            raise ImageError(
                "The image is too elongated",
                where=f"{image.width} × {image.height} pixels",
                fix="Crop or remove it",
            )
        scaled = image.resize((columns, rows), Image.Resampling[interpolation.upper()])
        halve = round if self.odd_margin == "nearest" else math.floor
        left, top = halve((columns - width) / 2), halve((rows - height) / 2)
        return scaled.crop((left, top, left + width, top + height))

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image after scaling, before the crop.

        A square target rounds the longer side down and another target rounds both sides to the
        nearest, as torchvision's ``Resize`` and timm's ``ResizeKeepRatio`` do.
        """
        rows, columns = (math.floor(side / self.crop_share) for side in self.size)
        if self.crop == "squash":
            return rows, columns
        if rows == columns:
            short, long = sorted((height, width))
            scaled_long = int(rows * long / short)
            return (rows, scaled_long) if height <= width else (scaled_long, columns)
        ratio = min(height / rows, width / columns)
        return round(height / ratio), round(width / ratio)

    def pixels(self, views: "Sequence[Image.Image]") -> "Tensor":
        """A batch (image, 3, height, width) of normalised float32 from views."""
        import torch

        stack = np.stack([np.asarray(view, dtype=np.uint8) for view in views])
        return self.normalise(torch.from_numpy(stack))

    def normalise(self, views: "Tensor") -> "Tensor":
        """The same from a batch (image, height, width, 3) of bytes, on the device it is on."""
        import torch

        batch = views.permute(0, 3, 1, 2).contiguous().float().div_(255.0)
        mean, std = (torch.tensor(values, device=batch.device) for values in (self.mean, self.std))
        return batch.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1))
