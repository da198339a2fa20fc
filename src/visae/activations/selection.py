"""Which tokens of a store take part: all of them, or those that a filter leaves."""

import dataclasses
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from visae.activations.mixing import even_order, uneven_order

__all__ = ["Selection"]


@final
@dataclasses.dataclass(frozen=True)
class Selection:
    """The tokens that take part, image by image."""

    images: Int64[np.ndarray, " image"]
    """Ascending rows of the images that give tokens."""
    positions: Int64[Tensor, " position"]
    """The positions that all of them give, counted from the first token read of an image."""
    chosen: Bool[Tensor, "image position"] | None = None
    """Where images give different tokens: those of each image, among ``positions``' range."""

    @property
    def n_tokens(self) -> int:
        """Tokens that take part."""
        if self.chosen is not None:
            return int(self.chosen.sum())
        return len(self.images) * len(self.positions)

    @classmethod
    def everything(cls, n_images: int, n_positions: int) -> "Selection":
        """All tokens of all images."""
        return cls(np.arange(n_images), torch.arange(n_positions))

    def order(
        self,
        images: Int64[np.ndarray, " slot"],
        per_image: int,
        *,
        generator: torch.Generator,
    ) -> Int64[Tensor, " token"]:
        """A mixed order of the tokens of some images, as slot · per_image + position."""
        if self.chosen is None:
            return even_order(len(images), self.positions, stride=per_image, generator=generator)
        rows = np.searchsorted(self.images, images)
        return uneven_order(self.chosen[rows], generator=generator)

    def tokens_of(
        self, images: Int64[np.ndarray, " slot"], per_image: int
    ) -> Int64[Tensor, " token"]:
        """The tokens of some images in their own order, as slot · per_image + position."""
        if self.chosen is None:
            slots = torch.arange(len(images))[:, None] * per_image
            return (slots + self.positions).flatten()
        rows = np.searchsorted(self.images, images)
        slots, positions = self.chosen[rows].nonzero(as_tuple=True)
        return slots * per_image + positions
