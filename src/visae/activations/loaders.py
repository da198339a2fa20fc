"""Batches of tokens from a store: shuffled, the same for one seed, resumable at any batch.

``ShuffledTokens`` reads runs of neighbouring images from many random places into a mixing buffer
and draws batches from it. How it mixes: ``visae.activations.mixing_buffer``.
"""

from collections.abc import Iterator
from typing import final

from visae.activations.filling import TokenBatch, in_order, joined
from visae.activations.mixing_buffer import LoaderState, MixedTokens
from visae.activations.normalisation import Normalisation
from visae.activations.selection import Selection
from visae.activations.store_filler import StoreFiller
from visae.activations.stored import StoredTokens
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing

__all__ = ["ShuffledTokens"]

_REFERENCE_IMAGES = 8
_REFERENCE_TOKENS = 64


@final
class ShuffledTokens:
    """Endless batches of mixed tokens of a store, at one or several sites.

    In each pass over the store every token comes exactly once; batches run on from one pass into
    the next. ``state`` says where the stream stands; set it to what it was and the stream goes on
    from there, bit for bit, whatever the number of threads.

    Args:
        store: The activations.
        sites: Some of its sites, of the same layout: each batch has the same tokens at all.
        tokens: Which of its tokens; without it, all that were recorded.
        batch_size: Tokens in a batch.
        buffer_bytes: Memory for mixing. The first batch comes when half of it is read, or the
            whole store where that fits. Batches are as mixed as uniform draws where half of it
            holds as many images as a batch has tokens.
        seed: Fixes the order.
        n_threads: Files read at the same time.

    Raises:
        StoreError: when the store, or half the buffer, holds fewer tokens than a batch; when the
            sites have different layouts; when a file is missing or cut short.
        ModelError: when the tokens were not recorded.
    """

    images: None = None
    """A store's tokens need no images."""

    def __init__(
        self,
        store: StoredTokens,
        *sites: str,
        tokens: TokenPolicy | None = None,
        batch_size: int,
        buffer_bytes: int = 2**30,
        seed: int = 0,
        n_threads: int = 2,
    ) -> None:
        self.sites, self.batch_size = sites, batch_size
        self.tokens: TokenPolicy = tokens or store.tokens
        self._store = store
        self._filler = StoreFiller(store, sites, self.tokens, n_threads=n_threads)
        self._selection = Selection.everything(store.n_images, self._filler.n_positions)
        self._mixed = MixedTokens(
            self._filler,
            self._selection,
            batch_size=batch_size,
            buffer_bytes=buffer_bytes,
            seed=seed,
        )

    @property
    def state(self) -> LoaderState:
        """Where the stream stands."""
        return self._mixed.state

    @state.setter
    def state(self, state: LoaderState) -> None:
        self._mixed.state = state

    def __iter__(self) -> Iterator[TokenBatch]:
        return iter(self._mixed)

    @property
    def model(self) -> ModelIdentity:
        """The model whose activations they are."""
        return self._store.identity

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images became its input, where that is known."""
        return self._store.preprocessing

    @property
    def digest(self) -> str:
        """Hash of the store."""
        return self._store.digest

    def layout(self, site: str) -> Layout:
        """Order of the model's tokens at a site."""
        return self._store.site(site).layout

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""
        return self._store.site(site).d_model

    def normalisation(self, site: str) -> Normalisation:
        """Mean and scale of all these tokens of the store."""
        return Normalisation.of_statistics(self._store.statistics(site, self.tokens))

    def reference(self) -> TokenBatch:
        """Some tokens of the first images, for a checkpoint to prove itself on."""
        images = self._selection.images[:_REFERENCE_IMAGES]
        found = joined(list(in_order(self._filler, self._selection, images, n_slots=len(images))))
        return found.every(max(1, len(found.images) // _REFERENCE_TOKENS))
