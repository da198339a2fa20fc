"""Which tokens of a store take part: all of them, or those that a filter leaves.

``select`` applies a ``TokenFilter`` to a store; the mixing buffer asks the ``Selection`` in which
order to draw.
"""

import dataclasses
from collections.abc import Iterable
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from visae.activations.mixing import even_order, uneven_order
from visae.activations.stored import StoredTokens
from visae.activations.token_filter import TokenFilter
from visae.errors import StoreError, nearest_names
from visae.models.layout import Layout, TokenPolicy

__all__ = ["Selection", "select"]


@final
@dataclasses.dataclass(frozen=True)
class Selection:
    """The tokens that take part, image by image."""

    images: Int64[np.ndarray, " image"]
    """Ascending rows of the images that give tokens."""
    positions: Int64[Tensor, " position"]
    """The positions they give, counted from the first token that is read of an image."""
    chosen: Bool[Tensor, "image position_read"] | None = None
    """Where images give different positions: which of the tokens read each image gives."""

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
        return uneven_order(self.chosen[self._rows(images)], generator=generator)

    def tokens_of(
        self, images: Int64[np.ndarray, " slot"], per_image: int
    ) -> Int64[Tensor, " token"]:
        """The tokens of some images in their own order, as slot · per_image + position."""
        if self.chosen is None:
            slots = torch.arange(len(images))[:, None] * per_image
            return (slots + self.positions).flatten()
        slots, positions = self.chosen[self._rows(images)].nonzero(as_tuple=True)
        return slots * per_image + positions

    def _rows(self, images: Int64[np.ndarray, " slot"]) -> Int64[Tensor, " slot"]:
        return torch.from_numpy(np.searchsorted(self.images, images))


def select(
    store: StoredTokens, site: str, *, tokens: TokenPolicy, where: TokenFilter | None
) -> Selection:
    """The tokens of a store that pass a filter.

    Raises:
        StoreError: when the filter names what the store does not have, or nothing passes.
    """
    layout = store.site(site).layout
    if where is None or where.is_empty:
        return Selection.everything(store.n_images, layout.n_kept(tokens))
    images = np.flatnonzero(_images_that_pass(store, where))
    positions = _positions_that_pass(layout, tokens, where)
    selection = Selection(images, positions)
    if where.patch_labels and len(images) and len(positions):
        selection = _by_patch_labels(store, site, selection, tokens, where)
    if selection.n_tokens == 0:
        what = "No token passes the filter"
        raise StoreError(what, where=store.folder, fix="Ask for less, or for something else")
    return selection


def _images_that_pass(store: StoredTokens, where: TokenFilter) -> Bool[np.ndarray, " image"]:
    passing = np.ones(store.n_images, dtype=bool)
    for title, names, column in _wanted_names(store, where):
        passing &= _is_one_of(title, names, column, store)
    if where.side is not None:
        passing &= np.array([side == where.side for side in store.images.sides()], dtype=bool)
    if where.images is not None:
        rows = np.array(where.images, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < store.n_images):
            fix = f"Give rows from 0 to {store.n_images - 1}"
            raise StoreError("There is no such image", where=store.folder, fix=fix)
        passing &= np.isin(np.arange(store.n_images), rows)
    return passing


def _wanted_names(
    store: StoredTokens, where: TokenFilter
) -> Iterable[tuple[str, tuple[str, ...], tuple[str | None, ...]]]:
    """For each condition on text: its title, the texts that pass, and what the images have."""
    if where.labels:
        yield "label", where.labels, store.images.labels
    if where.groups:
        yield "group", where.groups, store.images.groups
    for name, text in where.metadata:
        columns = store.images.metadata
        if name not in columns:
            fix = f"Use one of: {nearest_names(name, columns)}"
            raise StoreError(f"There is no metadata column {name}", where=store.folder, fix=fix)
        yield name, (text,), columns[name]


def _is_one_of(
    title: str, names: tuple[str, ...], column: tuple[str | None, ...], store: StoredTokens
) -> Bool[np.ndarray, " image"]:
    known = {name for name in column if name is not None}
    if not known:
        raise StoreError(
            f"The images of this store have no {title}s",
            where=store.folder,
            fix="Leave this filter out, or record images that have them",
        )
    for name in names:
        if name not in known:
            raise StoreError(
                f"No image has the {title} {name}",
                where=store.folder,
                fix=f"Use one of: {nearest_names(name, known)}",
            )
    return np.array([name in names for name in column], dtype=bool)


def _positions_that_pass(
    layout: Layout, tokens: TokenPolicy, where: TokenFilter
) -> Int64[Tensor, " position"]:
    """Positions within the tokens of the policy."""
    kept = layout.kept(tokens)
    if not where.concerns_patches:
        return torch.arange(kept.stop - kept.start)
    n_rows, n_columns = layout.grid
    patches = torch.arange(layout.n_patches).view(n_rows, n_columns)
    rows, columns = where.patch_rows or (0, n_rows), where.patch_columns or (0, n_columns)
    positions: Tensor = (
        patches[slice(*rows), slice(*columns)].flatten() + layout.n_special - kept.start
    )
    return positions[positions < kept.stop - kept.start]


def _by_patch_labels(
    store: StoredTokens,
    site: str,
    selection: Selection,
    tokens: TokenPolicy,
    where: TokenFilter,
) -> Selection:
    """Those of a selection whose patch is of a class asked for, and pure enough."""
    classes, labels, purity = store.patch_labels(site)
    values = {name: value for value, name in classes.items()}
    for name in where.patch_labels:
        if name not in values:
            fix = f"Use one of: {nearest_names(name, values)}"
            raise StoreError(f"No patch class is called {name}", where=store.folder, fix=fix)
    wanted = torch.tensor([values[name] for name in where.patch_labels], dtype=labels.dtype)
    images = torch.from_numpy(selection.images)
    passing = torch.isin(labels[images], wanted) & (purity[images] >= where.least_purity)
    layout = store.site(site).layout
    kept = layout.kept(tokens)
    patches = selection.positions + kept.start - layout.n_special
    chosen = torch.zeros((len(images), kept.stop - kept.start), dtype=torch.bool)
    chosen[:, selection.positions] = passing[:, patches]
    giving = chosen.any(1)
    return Selection(selection.images[giving.numpy()], selection.positions, chosen[giving])
