"""Which token is which: special tokens first, then patches row by row."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from visae.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Layout", "TokenPolicy"]

TokenPolicy = Literal["patches", "special", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The order of a model's tokens at a site."""

    special: tuple[str, ...]
    """Names of the special tokens, in order: ``cls``, ``register0``, …"""
    grid: tuple[int, int]
    """Rows and columns of the patch grid."""
    covered: tuple[int, int] | None = None
    """Height and width in pixels that the patches divide evenly, from the top left corner, where
    the input is no multiple of the patch and they leave a rest out; null: they divide all of it."""

    def seen(self, view: "Image.Image") -> "Image.Image":
        """The part of a view (or mask) that the patches lie on."""
        if self.covered is None:
            return view
        height, width = self.covered
        return view.crop((0, 0, width, height))

    @property
    def n_special(self) -> int:
        """Number of special tokens."""
        return len(self.special)

    @property
    def n_patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of one image."""
        return self.n_special + self.n_patches

    def kept(self, policy: TokenPolicy) -> slice:
        """The tokens that a policy keeps.

        Raises:
            ModelError: when the policy keeps none of this model's tokens.
        """
        if policy == "special" and not self.special:
            raise ModelError(
                "This model has no special tokens", where="--tokens special", fix="Keep patches"
            )
        start = 0 if policy in ("all", "special") else self.n_special
        stop = self.n_special if policy == "special" else self.n_tokens
        return slice(start, stop)

    def n_kept(self, policy: TokenPolicy) -> int:
        """Number of tokens of one image that a policy keeps."""
        kept = self.kept(policy)
        return int(kept.stop - kept.start)

    def within(self, wanted: TokenPolicy, stored: TokenPolicy) -> slice:
        """Where the tokens of one policy are among those another policy kept.

        Raises:
            ModelError: when some of the wanted tokens were not kept.
        """
        have, want = self.kept(stored), self.kept(wanted)
        if want.start < have.start or want.stop > have.stop:
            raise ModelError(
                f"The {wanted} tokens were not recorded: the store kept {stored} tokens",
                where="--tokens",
                fix=f"Use --tokens {stored}, or record again with --tokens all",
            )
        return slice(want.start - have.start, want.stop - have.start)

    def special_index(self, name: str) -> int:
        """Position of a special token.

        Raises:
            ModelError: when the model has no token of that name.
        """
        if name not in self.special:
            have = ", ".join(self.special) or "none"
            raise ModelError(
                f"This model has no {name} token",
                where=f"special tokens: {have}",
                fix="Use patches",
            )
        return self.special.index(name)
