"""What a tensor inside a network means: tokens, or a feature map with channels first or last.

``HookedModel`` measures each site once, on a blank image, and from then on turns the site's tensor
into tokens (image, token, d_model) and back by what was found.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from visae.models.layout import Layout

__all__ = ["Form", "SiteShape", "flatten", "map_form"]

Form = Literal["tokens", "channels first", "channels last"]


class SiteShape(NamedTuple):
    """How the tensor at a site is to be read."""

    layout: Layout
    """Order of its tokens."""
    d_model: int
    """Width of its activations."""
    form: Form
    """Where its channels are."""

    def unflatten(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens in the shape of the site's own tensor."""
        if self.form == "channels first":
            return tokens.transpose(1, 2).reshape(like.shape)
        return tokens.reshape(like.shape)


def flatten(features: Tensor, form: Form) -> Tensor:
    """(image, token, d_model) from tokens or from a feature map."""
    if form == "tokens":
        return features
    return features.flatten(1, 2) if form == "channels last" else features.flatten(2).mT


def map_form(shape: tuple[int, ...], size: tuple[int, int], usual: Form) -> Form | None:
    """Where the channels of a feature map are, told by which two axes lie over the input.

    ``shape`` is (image, a, b, c), ``size`` the input's height and width in pixels. Where both
    readings fit, it is the network's ``usual`` one; where neither does, None.
    """
    fitting: list[Form] = []
    if _lies_over((shape[2], shape[3]), size):
        fitting.append("channels first")
    if _lies_over((shape[1], shape[2]), size):
        fitting.append("channels last")
    if usual in fitting:
        return usual
    return fitting[0] if fitting else None


def _lies_over(grid: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a grid can be what one stride makes of an input of some size."""
    if size[0] == size[1]:
        return grid[0] == grid[1]
    strides = range(1, max(size) + 1)
    return any(
        all(n in (side // s, -(-side // s)) for n, side in zip(grid, size, strict=True))
        for s in strides
    )
