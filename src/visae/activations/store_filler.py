"""Fills the mixing buffer, or any memory for whole images, from the files of a store."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from visae.activations.stored import StoredTokens
from visae.activations.token_files import TokenReader
from visae.errors import StoreError
from visae.models.layout import Layout, TokenPolicy

__all__ = ["StoreFiller"]

_RUN_BYTES = 2**20


@final
class StoreFiller:
    """A ``Filler`` that reads a store; images that follow one another are read at once.

    Raises:
        StoreError: when the sites have different layouts, or a file is missing or cut short.
        ModelError: when the tokens were not recorded.
    """

    def __init__(
        self,
        store: StoredTokens,
        sites: Sequence[str],
        tokens: TokenPolicy,
        *,
        n_threads: int,
    ) -> None:
        layout = _only_layout(store, sites)
        within, kept = layout.within(tokens, store.tokens), layout.kept(tokens)
        self.widths = {name: store.site(name).d_model for name in sites}
        self.dtype: torch.dtype = getattr(torch, store.dtype)
        self.positions = kept
        self.n_positions = kept.stop - kept.start
        self._n_threads = n_threads
        token_bytes = {name: width * self.dtype.itemsize for name, width in self.widths.items()}
        self._readers = {
            name: TokenReader(
                store.token_files(name),
                skip_bytes=within.start * n_bytes,
                image_bytes=self.n_positions * n_bytes,
            )
            for name, n_bytes in token_bytes.items()
        }
        self.images_per_run = max(
            -(-_RUN_BYTES // (layout.n_kept(store.tokens) * n_bytes))
            for n_bytes in token_bytes.values()
        )

    def fill(
        self,
        images: Int64[np.ndarray, " image"],
        into: Mapping[str, Float[Tensor, "slot position _"]],
        stop: threading.Event,
    ) -> Int64[np.ndarray, " image"]:
        """Read the images into the first slots.

        Raises:
            StoreError: when a file is missing or ends too early.
        """
        with ThreadPoolExecutor(self._n_threads) as threads:
            for site, reader in self._readers.items():
                reader.read(images, into[site][: len(images)], threads)
        return images


def _only_layout(store: StoredTokens, sites: Sequence[str]) -> Layout:
    layouts = {store.site(name).layout for name in sites}
    if len(layouts) == 1:
        return layouts.pop()
    what = "No site is named"
    if layouts:
        what = f"These sites have {len(layouts)} different layouts, and so no tokens in common"
    fix = f"Choose among its sites: {', '.join(store.sites)}"
    raise StoreError(what, where=", ".join(sites) or store.folder, fix=fix)
