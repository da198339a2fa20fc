"""What to index; light, because the command line imports it."""

import dataclasses
from typing import Literal

from visae.errors import ConfigError

__all__ = ["IndexConfig", "Side"]

Side = Literal["all", "discovery"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which images to look at, and how many examples to keep."""

    side: Side = "all"
    """All images, or the discovery side only, so that the others can confirm what is found."""
    confirmation_share: float = 0.5
    """Share of the images that the discovery side leaves untouched."""
    salt: str = "visae"
    """Changes which images are on which side."""
    examples_per_band: int = 9
    """Images kept in each band of a feature's activation range."""
    seed: int = 0
    """Changes which images are drawn as examples within a band."""

    def __post_init__(self) -> None:
        if not 0.0 < self.confirmation_share < 1.0:
            raise ConfigError(
                f"confirmation_share is {self.confirmation_share}",
                fix="Give a share above 0 and below 1",
            )
        if self.examples_per_band < 1:
            raise ConfigError(
                f"examples_per_band is {self.examples_per_band}", fix="Keep at least one example"
            )
