"""Shuffled batches of tokens from a store, the same for one seed, resumable at any batch.

The store is cut into runs of whole images. Each pass permutes the runs, reads as many as fit the
buffer, and permutes all their tokens together; batches come from that permutation. A buffer that
holds the whole store gives an exact uniform shuffle.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

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


class ShuffledTokens:
    """Endless shuffled batches of one site's tokens, in float32.

    Args:
        store: A complete store.
        site: One of its sites.
        tokens: Which of its tokens; without it, all that were recorded.
        batch_size: Tokens in a batch; what does not fill the last batch of a buffer waits for the
            next pass, in which it falls elsewhere.
        buffer_bytes: Memory for the mixing buffer.
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
        record = store.site(site)
        token_bytes = record.d_model * (4 if store.record.dtype == "float32" else 2)
        image_bytes = token_bytes * store.tokens_per_image(site, tokens)
        self._runs = _runs(store, max(1, _RUN_BYTES // image_bytes))
        self._images_per_buffer = max(1, buffer_bytes // image_bytes)
        available = min(self._images_per_buffer, store.n_images) * store.tokens_per_image(
            site, tokens
        )
        if available < batch_size:
            raise StoreError(
                f"A batch of {batch_size} tokens is more than the {available} tokens there are",
                where=f"{store.folder}, {site}",
                fix="Give a smaller --batch-size, a larger buffer, or record more images",
            )
        self.state = LoaderState()

    def __iter__(self) -> Iterator[Float[Tensor, "token d_model"]]:
        while True:
            groups = self._groups(self.state.n_pass)
            while self.state.buffer < len(groups):
                yield from self._batches(groups[self.state.buffer])
                self.state = dataclasses.replace(self.state, buffer=self.state.buffer + 1, batch=0)
            self.state = LoaderState(n_pass=self.state.n_pass + 1)

    def _groups(self, n_pass: int) -> list[list[tuple[int, int, int]]]:
        """The runs of one pass, permuted and packed into buffers of similar size."""
        generator = torch.Generator().manual_seed(_mix(self._seed, n_pass, 0))
        order = torch.randperm(len(self._runs), generator=generator).tolist()
        n_groups = -(-self._store.n_images // self._images_per_buffer)
        per_group = -(-len(order) // n_groups)
        return [
            [self._runs[i] for i in order[start : start + per_group]]
            for start in range(0, len(order), per_group)
        ]

    def _batches(self, runs: list[tuple[int, int, int]]) -> Iterator[Tensor]:
        """Batches of one buffer, from the one after ``state.batch``."""
        read = [
            self._store.rows(self._site, shard, slice(start, stop), self._tokens)
            for shard, start, stop in sorted(runs)
        ]
        tokens = torch.cat(read).flatten(0, 1)
        generator = torch.Generator()
        generator.manual_seed(_mix(self._seed, self.state.n_pass, 1 + self.state.buffer))
        order = torch.randperm(tokens.shape[0], generator=generator)
        n_batches = tokens.shape[0] // self._batch_size
        for index in range(self.state.batch, n_batches):
            chosen = order[index * self._batch_size : (index + 1) * self._batch_size]
            self.state = dataclasses.replace(self.state, batch=index + 1)
            yield tokens[chosen].float()


def _runs(store: ActivationStore, images_per_run: int) -> list[tuple[int, int, int]]:
    """(shard, first image, last image + 1) of every run."""
    return [
        (shard, start, min(start + images_per_run, n_images))
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
