"""The tokens that an evaluation looks at: those an SAE reads, at its site, in a whole store.

Main name: ``EvaluatedTokens``.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from visae.activations.store import Shard
from visae.activations.stored import StoredTokens
from visae.models.layout import TokenPolicy

__all__ = ["EvaluatedTokens", "spread_evenly"]

_MOST_SAMPLED_IMAGES = 1024


@dataclasses.dataclass(frozen=True)
class EvaluatedTokens:
    """Every recorded token of a policy at a site."""

    store: StoredTokens
    """The activations."""
    site: str
    """One of its sites."""
    policy: TokenPolicy
    """Which of its tokens."""

    @property
    def n_images(self) -> int:
        """Images in the store."""
        return self.store.n_images

    @property
    def per_image(self) -> int:
        """Tokens of one image."""
        return self.store.tokens_per_image(self.site, self.policy)

    @property
    def n_tokens(self) -> int:
        """Tokens in all."""
        return self.n_images * self.per_image

    @functools.cached_property
    def mean(self) -> Float64[Tensor, " d_model"]:
        """Mean over all these tokens."""
        return self.store.statistics(self.site, self.policy).mean

    def shards(self) -> Iterator[Shard]:
        """The tokens, some whole images at a time, in order."""
        return self.store.shards(self.site, self.policy)

    def sample(self, n_tokens: int, *, seed: int) -> Float[Tensor, "token d_model"]:
        """Different tokens chosen at random, from up to 1 024 images spread over the store."""
        rows = spread_evenly(self.n_images, min(_MOST_SAMPLED_IMAGES, n_tokens))
        tokens = torch.cat(list(self._images(rows)))
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(tokens), generator=generator)[:n_tokens]
        return tokens[chosen].float()

    def _images(self, rows: Int64[np.ndarray, " image"]) -> Iterator[Float[Tensor, "..."]]:
        """Tokens of some images, which are ascending rows of the store."""
        first = 0
        for index in range(self.store.n_shards):
            n_images = self.store.n_images_in_shard(index)
            inside = rows[(rows >= first) & (rows < first + n_images)] - first
            for row in inside.tolist():
                images = slice(row, row + 1)
                yield self.store.rows(self.site, index, images, self.policy)[0]
            first += n_images


def spread_evenly(n_items: int, n_wanted: int) -> Int64[np.ndarray, " chosen"]:
    """Ascending positions of up to ``n_wanted`` items, at equal distances."""
    n_chosen = min(n_items, n_wanted)
    return (np.arange(n_chosen) * n_items // max(1, n_chosen)).astype(np.int64)
