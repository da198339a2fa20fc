"""Shuffled batches of tokens from a store, the same for one seed, resumable at any batch.

The store is cut into runs of whole images. Each pass permutes the runs, divides them evenly into
as few buffers as the memory allows, reads one buffer after the other and permutes all its tokens
together; batches come from that permutation. A buffer that holds the whole store gives an exact
uniform shuffle.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.format import N_BYTES
from visae.activations.store import ActivationStore
from visae.errors import StoreError
from visae.models.layout import TokenPolicy

__all__ = ["LoaderState", "ShuffledTokens"]

_RUN_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where a shuffled loader stands."""

    n_pass: int = 0
    """Passes over the store finished."""
    buffer: int = 0
    """Buffers of this pass used up."""
    batch: int = 0
    """Batches of this buffer handed out."""


class _Run(NamedTuple):
    """Some neighbouring images of a shard."""

    shard: int
    start: int
    stop: int


class ShuffledTokens:
    """Endless shuffled batches of one site's tokens, in float32.

    Args:
        store: A complete store.
        site: One of its sites.
        tokens: Which of its tokens; without it, all that were recorded.
        batch_size: Tokens in a batch; what does not fill the last batch of a buffer waits for the
            next pass, in which it falls elsewhere.
        buffer_bytes: Memory for the mixing buffer, roughly.
        seed: Fixes the order.

    Raises:
        StoreError: when the store, or a buffer, holds fewer tokens than a batch.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
        *,
        tokens: TokenPolicy | None = None,
        batch_size: int,
        buffer_bytes: int = 2**30,
        seed: int = 0,
    ) -> None:
        self._store, self._site, self._tokens = store, site, tokens
        self._batch_size, self._seed = batch_size, seed
        self._per_image = store.tokens_per_image(site, tokens)
        token_bytes = store.site(site).d_model * N_BYTES[store.record.dtype]
        images_per_buffer = max(1, buffer_bytes // (token_bytes * self._per_image))
        available = min(images_per_buffer, store.n_images) * self._per_image
        if available < batch_size:
            raise StoreError(
                f"A batch of {batch_size} tokens is more than the {available} tokens there are",
                where=f"{store.folder}, {site}",
                fix="Give a smaller --batch-size, a larger buffer, or record more images",
            )
        per_run = min(_RUN_BYTES // (token_bytes * self._per_image), images_per_buffer // 8)
        self._runs = _runs(store, max(1, per_run))
        images_per_batch = -(-batch_size // self._per_image)
        fewest = -(-store.n_images // images_per_buffer)
        self._n_buffers = max(1, min(fewest, store.n_images // images_per_batch))
        self.state = LoaderState()

    def __iter__(self) -> Iterator[Float[Tensor, "token d_model"]]:
        while True:
            groups = self._groups(self.state.n_pass)
            while self.state.buffer < len(groups):
                yield from self._batches(groups[self.state.buffer])
                self.state = dataclasses.replace(self.state, buffer=self.state.buffer + 1, batch=0)
            self.state = LoaderState(n_pass=self.state.n_pass + 1)

    def _groups(self, n_pass: int) -> list[list[_Run]]:
        """The runs of one pass, permuted and divided into buffers with as many images each."""
        generator = torch.Generator().manual_seed(_mix(self._seed, n_pass, 0))
        order = torch.randperm(len(self._runs), generator=generator).tolist()
        groups: list[list[_Run]] = [[] for _ in range(self._n_buffers)]
        n_before = 0
        for run in (self._runs[i] for i in order):
            groups[n_before * self._n_buffers // self._store.n_images].append(run)
            n_before += run.stop - run.start
        return groups

    def _batches(self, runs: list[_Run]) -> Iterator[Tensor]:
        """Batches of one buffer, from the one after ``state.batch``."""
        tokens = self._read(runs)
        generator = torch.Generator()
        generator.manual_seed(_mix(self._seed, self.state.n_pass, 1 + self.state.buffer))
        order = torch.randperm(tokens.shape[0], generator=generator)
        n_batches = tokens.shape[0] // self._batch_size
        for index in range(self.state.batch, n_batches):
            chosen = order[index * self._batch_size : (index + 1) * self._batch_size]
            self.state = dataclasses.replace(self.state, batch=index + 1)
            yield tokens[chosen].float()

    def _read(self, runs: list[_Run]) -> Float[Tensor, "token d_model"]:
        """All tokens of some runs, read in the order of the files."""
        n_images = sum(run.stop - run.start for run in runs)
        shape = n_images, self._per_image, self._store.site(self._site).d_model
        tokens = torch.empty(shape, dtype=getattr(torch, self._store.record.dtype))
        at = 0
        for run in sorted(runs):
            images = slice(run.start, run.stop)
            rows = self._store.rows(self._site, run.shard, images, self._tokens)
            tokens[at : at + rows.shape[0]] = rows
            at += rows.shape[0]
        return tokens.flatten(0, 1)


def _runs(store: ActivationStore, images_per_run: int) -> list[_Run]:
    """The store's images, cut into runs that stay within a shard."""
    return [
        _Run(shard, start, min(start + images_per_run, n_images))
        for shard in range(store.n_shards)
        for n_images in [store.n_images_in_shard(shard)]
        for start in range(0, n_images, images_per_run)
    ]


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    result = 0
    for number in numbers:
        result = (result * 1_000_003 + number + 0x9E3779B9) % 2**63
    return result
