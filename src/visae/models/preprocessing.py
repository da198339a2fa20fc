"""From an image to the pixels a model sees, in two steps so that the second can be shown.

``view`` resizes and crops to exactly what the model looks at (heat maps are drawn on it);
``pixels`` normalises views into a batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from visae.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Preprocessing"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model's input is made; travels with stores, SAEs and indexes."""

    size: tuple[int, int]
    """Height and width of the input in pixels."""
    crop_share: float = 1.0
    """Share of the resized image's shorter side that the centre crop keeps."""
    crop: Literal["center", "squash"] = "center"
    """Keep the aspect ratio and crop at the centre, or squash the whole image into ``size``."""
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

        The image is scaled until it just covers ``size / crop_share``, then cropped at the
        centre, with the rounding of torchvision's ``Resize`` and ``CenterCrop``.
        """
        from PIL import Image

        height, width = self.size
        if self.crop == "squash":
            return image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        cover = math.floor(height / self.crop_share), math.floor(width / self.crop_share)
        scale = max(cover[0] / image.height, cover[1] / image.width)
        target = (
            max(cover[1], int(image.width * scale + 1e-6)),
            max(cover[0], int(image.height * scale + 1e-6)),
        )
        resized = image.resize(target, Image.Resampling[self.interpolation.upper()])
        left, top = round((target[0] - width) / 2), round((target[1] - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    def pixels(self, views: "Sequence[Image.Image]") -> "Tensor":
        """A batch (image, 3, height, width) of normalised float32 from views."""
        import torch

        stack = np.stack([np.asarray(view, dtype=np.uint8) for view in views])
        batch = torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(255.0)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return batch.sub_(mean.view(1, 3, 1, 1)).div_(std.view(1, 3, 1, 1)).contiguous()
