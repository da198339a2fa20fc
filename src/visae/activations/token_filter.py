"""``TokenFilter``: which tokens of a store take part, by image, by place or by what they show."""

import dataclasses

from visae.errors import ConfigError
from visae.images.splits import Split

__all__ = ["TokenFilter"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFilter:
    """Conditions on the tokens of a store; every condition that is given must hold."""

    labels: tuple[str, ...] = ()
    """Images of one of these classes."""
    groups: tuple[str, ...] = ()
    """Images of one of these groups."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Images whose metadata column has this text, for each (column, text)."""
    side: Split | None = None
    """Images on this side of the division into discovery and confirmation."""
    images: tuple[int, ...] | None = None
    """Images in these rows of the store."""
    patch_labels: tuple[str, ...] = ()
    """Patches of one of these classes, by the images' masks."""
    least_purity: float = 0.5
    """Share of a patch's pixels that must be of its class, where patch_labels are given."""
    patch_rows: tuple[int, int] | None = None
    """Patches from this row of the grid, counted from 0, to before that row."""
    patch_columns: tuple[int, int] | None = None
    """Patches from this column of the grid, counted from 0, to before that column."""

    def __post_init__(self) -> None:
        if not 0 <= self.least_purity <= 1:
            raise ConfigError(
                f"least_purity is {self.least_purity}", fix="Give a share from 0 to 1"
            )
        for name in ("patch_rows", "patch_columns"):
            bounds = getattr(self, name)
            if bounds is not None and not 0 <= bounds[0] < bounds[1]:
                raise ConfigError(
                    f"{name} goes from {bounds[0]} to {bounds[1]}",
                    fix="Give the first and, larger, the one after the last, counted from 0",
                )

    @property
    def is_empty(self) -> bool:
        """Whether it lets every token pass."""
        return self == TokenFilter(least_purity=self.least_purity)

    @property
    def concerns_patches(self) -> bool:
        """Whether it looks at patches, which leaves special tokens out."""
        return bool(self.patch_labels or self.patch_rows or self.patch_columns)
