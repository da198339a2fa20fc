"""Batches of tokens from a store: shuffled and resumable at any batch, or in order.

``ShuffledTokens`` reads runs of neighbouring images from many random places into a mixing buffer
and draws batches from it. How it mixes: ``visae.activations.mixing_buffer``. ``OrderedTokens``
goes through a store once, from the first image to the last.
"""

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import final

from visae.activations.filling import TokenBatch, in_order, joined
from visae.activations.mixing_buffer import LoaderState, MixedTokens
from visae.activations.normalisation import Normalisation
from visae.activations.selection import select
from visae.activations.store_filler import StoreFiller
from visae.activations.stored import StoredTokens
from visae.activations.token_filter import TokenFilter
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.storage.hashing import hash_json
from visae.storage.records import to_plain

__all__ = ["OrderedTokens", "ShuffledTokens"]

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
        where: Which of these tokens; without it, all.
        batch_size: Tokens in a batch.
        buffer_bytes: Memory for mixing. The first batch comes when half of it is read, or the
            whole store where that fits. Batches are as mixed as uniform draws where half of it
            holds as many images as a batch has tokens; without it, so much, within 1 and 4 GiB.
        seed: Fixes the order.
        n_threads: Files read at the same time.

    Raises:
        StoreError: when the store, what the filter leaves of it, or half the buffer holds fewer
            tokens than a batch; when the sites have different layouts; when a file is missing or
            cut short.
        ModelError: when the tokens were not recorded.
    """

    images: None = None
    """A store's tokens need no images."""

    def __init__(
        self,
        store: StoredTokens,
        *sites: str,
        tokens: TokenPolicy | None = None,
        where: TokenFilter | None = None,
        batch_size: int,
        buffer_bytes: int | None = None,
        seed: int = 0,
        n_threads: int = 2,
    ) -> None:
        self.sites, self.batch_size = sites, batch_size
        self.tokens: TokenPolicy = tokens or store.tokens
        self._store = store
        self._where = None if where is None or where.is_empty else where
        self._filler = StoreFiller(store, sites, self.tokens, n_threads=n_threads)
        self._selection = select(store, sites[0], tokens=self.tokens, where=where)
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

    def __iter__(self) -> Generator[TokenBatch]:
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
        """Hash of the store and of the filter."""
        if self._where is None:
            return self._store.digest
        return hash_json([self._store.digest, to_plain(self._where)])

    def layout(self, site: str) -> Layout:
        """Order of the model's tokens at a site."""
        return self._store.site(site).layout

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""
        return self._store.site(site).d_model

    def normalisation(self, site: str) -> Normalisation:
        """Mean and scale of the tokens that take part; with a filter, all of them are read."""
        if self._where is None:
            return Normalisation.of_statistics(self._store.statistics(site, self.tokens))
        everything = in_order(self._filler, self._selection, self._selection.images)
        return Normalisation.of_tokens(batch.activations[site] for batch in everything)

    def reference(self) -> TokenBatch:
        """Some tokens of the first images, for a checkpoint to prove itself on."""
        images = self._selection.images[:_REFERENCE_IMAGES]
        found = joined(list(in_order(self._filler, self._selection, images)))
        return found.every(max(1, len(found.images) // _REFERENCE_TOKENS))


@final
class OrderedTokens:
    """The tokens of a store once, image by image in the order they were recorded.

    Args:
        store: The activations.
        sites: Some of its sites, of the same layout: each batch has the same tokens at all.
        tokens: Which of its tokens; without it, all that were recorded.
        where: Which of these tokens; without it, all.
        images_per_batch: Images whose tokens make a batch (filtered ones have fewer); the next
            batch is read while one is used.

    Raises:
        StoreError: when the filter leaves nothing, the sites have different layouts, or a file
            is missing or cut short.
        ModelError: when the tokens were not recorded.
    """

    def __init__(
        self,
        store: StoredTokens,
        *sites: str,
        tokens: TokenPolicy | None = None,
        where: TokenFilter | None = None,
        images_per_batch: int = 64,
    ) -> None:
        policy: TokenPolicy = tokens or store.tokens
        self._filler = StoreFiller(store, sites, policy, n_threads=1)
        self._selection = select(store, sites[0], tokens=policy, where=where)
        self._images_per_batch = images_per_batch

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self._selection.images) / self._images_per_batch)

    def __iter__(self) -> Generator[TokenBatch]:
        batches = in_order(
            self._filler,
            self._selection,
            self._selection.images,
            n_slots=self._images_per_batch,
        )
        with ThreadPoolExecutor(1, thread_name_prefix="visae-ordered") as reader:
            ahead = reader.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                yield batch
