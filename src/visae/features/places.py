"""Where tokens are in their image: special, patch, and patch at the border."""

import dataclasses

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from visae.models.layout import Layout, TokenPolicy

__all__ = ["TokenPlaces"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPlaces:
    """The encoded tokens of one image: some special ones, then the patches row by row, or none."""

    n_tokens: int
    """Encoded tokens of an image."""
    n_special: int
    """Of these, special tokens, which come first."""
    grid: tuple[int, int]
    """Rows and columns of the patches; (0, 0) where none were encoded."""

    @classmethod
    def of(cls, layout: Layout, policy: TokenPolicy) -> "TokenPlaces":
        """The tokens that a policy keeps of a layout."""
        return cls(
            n_tokens=layout.n_kept(policy),
            n_special=0 if policy == "patches" else layout.n_special,
            grid=(0, 0) if policy == "special" else layout.grid,
        )

    @property
    def n_patches(self) -> int:
        """Encoded patches of an image."""
        return self.grid[0] * self.grid[1]

    def patch_of(self, tokens: Int64[Tensor, " entry"]) -> Int64[Tensor, " entry"]:
        """Patch number of tokens counted over all images; negative for special tokens."""
        return tokens % self.n_tokens - self.n_special

    @property
    def is_border(self) -> Bool[Tensor, " patch"]:
        """Whether each patch lies in the first or last row or column."""
        rows, columns = self.grid
        inner = torch.ones(self.grid, dtype=torch.bool)
        inner[1 : rows - 1, 1 : columns - 1] = False
        return inner.flatten()
