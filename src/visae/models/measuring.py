"""What a site gives for one blank image: its width, its token layout, where its channels are."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visae.errors import ModelError
from visae.models.architecture import Architecture
from visae.models.layout import Layout
from visae.models.shapes import Form, SiteShape, map_form

__all__ = ["site_shape"]


def site_shape(
    architecture: Architecture,
    values: Sequence[Any],
    *,
    site: str,
    name: str,
    size: tuple[int, int],
) -> SiteShape:
    """How a site's tensor is to be read, from what it gave in a pass over one image.

    ``size`` is the image's height and width in pixels; errors call the model ``name``.

    Raises:
        ModelError: when the site ran never or more than once, or gave something else than tokens
            on the model's patch grid or a feature map.
    """
    shape = tuple(_only(values, site).shape)
    where = f"{name}, {site}"
    if len(shape) == 3 and shape[0] == 1:
        return SiteShape(
            _token_layout(architecture, site, shape[1], where, size), shape[2], "tokens"
        )
    form = _map_form(architecture, site, shape, size)
    if form is None:
        raise ModelError(
            f"This site gives a tensor of shape {shape} for one image",
            where=where,
            fix="Choose a site that gives tokens or a feature map",
        )
    rows, columns, width = shape[1:] if form == "channels last" else (*shape[2:], shape[1])
    return SiteShape(Layout(special=(), grid=(rows, columns)), width, form)


def _only(values: Sequence[Any], site: str) -> Tensor:
    """The one tensor that a site gave."""
    if len(values) == 1 and isinstance(values[0], Tensor):
        return values[0]
    if not values:
        what = "does not run"
    elif len(values) > 1:
        what = "runs more than once"
    else:
        what = f"gives a {type(values[0]).__name__}"
    raise ModelError(
        f"The module {site} {what} in a forward pass",
        fix="Choose a module that gives one tensor, once: tokens or a feature map",
    )


def _map_form(
    architecture: Architecture, site: str, shape: tuple[int, ...], size: tuple[int, int]
) -> Form | None:
    """Where the channels of a feature map are; None for any other tensor."""
    if len(shape) != 4 or shape[0] != 1:
        return None
    known = architecture.layouts.get(site)
    if known is None:
        return map_form(shape, size, architecture.usual_form)
    fitting: dict[Form, bool] = {
        "channels first": shape[2:] == known.grid,
        "channels last": shape[1:3] == known.grid,
    }
    forms = [form for form, fits in fitting.items() if fits and not known.special]
    return architecture.usual_form if architecture.usual_form in forms else next(iter(forms), None)


def _token_layout(
    architecture: Architecture, site: str, n_tokens: int, where: str, size: tuple[int, int]
) -> Layout:
    """The layout of so many tokens: with the special tokens or, past a point, without."""
    layouts = [
        Layout(special=names, grid=grid, covered=_covered(architecture, grid, size))
        for names in (architecture.special, ())
        for grid in architecture.grids
    ]
    if known := architecture.layouts.get(site):
        _check_known(known, n_tokens, where)
        layouts = [known]
    for layout in layouts:
        if layout.n_tokens == n_tokens and layout.n_patches > 0:
            return layout
    height, width = size
    raise ModelError(
        f"Cannot tell the patch grid: {n_tokens} tokens at {height} × {width} pixels",
        where=where,
        fix="Choose a site whose tokens lie on the model's patch grid",
    )


def _covered(
    architecture: Architecture, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int] | None:
    """What of the input the patches lie on, None where they leave nothing out."""
    patch = architecture.patch_size
    if patch is None or grid != architecture.grids[0]:
        return None
    covered = grid[0] * patch[0], grid[1] * patch[1]
    return None if covered == size else covered


def _check_known(layout: Layout, n_tokens: int, where: str) -> None:
    if layout.n_tokens != n_tokens:
        raise ModelError(
            f"This site gives {n_tokens} tokens, and its layout says {layout.n_tokens}",
            where=where,
            fix=f"Correct the layout: {layout.n_special} special tokens and {layout.n_patches} "
            "patches",
        )
