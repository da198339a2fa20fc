"""From whole images in memory to batches of tokens: what all streams of tokens share.

A ``Filler`` puts the tokens of images into memory, one image a slot: from the files of a store, or
from a model that runs on the images. ``gather`` takes tokens out; ``in_order`` goes through all.
"""

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from visae.activations.selection import Selection

__all__ = ["Filler", "TokenBatch", "gather", "in_order", "joined", "memory_for"]


class TokenBatch(NamedTuple):
    """Tokens, and where they come from."""

    activations: Mapping[str, Float[Tensor, "token _"]]
    """At each site the same tokens, in the number format they are stored in."""
    images: Int64[Tensor, " token"]
    """Row of each token's image in the store (of a live stream: among the source's entries)."""
    positions: Int64[Tensor, " token"]
    """Its position among all tokens of the image at these sites, special tokens first."""

    def first(self, n_tokens: int) -> "TokenBatch":
        """Its first tokens alone."""
        tokens = {site: values[:n_tokens] for site, values in self.activations.items()}
        return TokenBatch(tokens, self.images[:n_tokens], self.positions[:n_tokens])

    def every(self, step: int) -> "TokenBatch":
        """The first token and every ``step``-th after it."""
        tokens = {site: values[::step] for site, values in self.activations.items()}
        return TokenBatch(tokens, self.images[::step], self.positions[::step])


@runtime_checkable
class Filler(Protocol):
    """What puts the tokens of whole images into memory."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations of each site."""

    @property
    def dtype(self) -> torch.dtype:
        """Their number format."""

    @property
    def positions(self) -> slice:
        """Which tokens of each image it gives, among all tokens of the image."""

    @property
    def images_per_run(self) -> int:
        """How many neighbouring images are best taken together."""

    def fill(
        self,
        images: Int64[np.ndarray, " image"],
        into: Mapping[str, Float[Tensor, "slot position _"]],
        stop: threading.Event,
    ) -> Int64[np.ndarray, " filled"]:
        """Put ascending images into the first slots, and say which images the slots now hold.

        It may leave images out, and may give up early once ``stop`` is set.
        """


def memory_for(filler: Filler, n_slots: int) -> dict[str, Float[Tensor, "slot position _"]]:
    """Memory that a filler can fill with so many images."""
    n_positions = filler.positions.stop - filler.positions.start
    shapes = {site: (n_slots, n_positions, width) for site, width in filler.widths.items()}
    return {
        site: _memory(math.prod(shape) * filler.dtype.itemsize).view(filler.dtype).view(shape)
        for site, shape in shapes.items()
    }


def _memory(n_bytes: int) -> UInt8[Tensor, " byte"]:
    """Memory in large pages where the system has them: drawing from it is a quarter faster."""
    if sys.platform != "linux":
        return torch.empty(n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, max(1, n_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages is slower, not wrong
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:n_bytes]


def gather(
    memory: Mapping[str, Float[Tensor, "slot position _"]],
    drawn: Int64[Tensor, " token"],
    images: Int64[Tensor, " image"],
    *,
    first_position: int,
) -> TokenBatch:
    """The tokens ``drawn`` (slot · n_positions + position), copied out of the memory."""
    per_image = next(iter(memory.values())).shape[1]
    narrow = drawn.numpy().astype(np.uint32)  # whose division is several times faster
    slots = torch.from_numpy((narrow // np.uint32(per_image)).astype(np.int64))
    return TokenBatch(
        activations={
            site: tokens.flatten(0, 1).index_select(0, drawn) for site, tokens in memory.items()
        },
        images=images[slots],
        positions=drawn - slots * per_image + first_position,
    )


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Several batches as one; a single one as it is."""
    if len(batches) == 1:
        return batches[0]
    return TokenBatch(
        activations={
            site: torch.cat([batch.activations[site] for batch in batches])
            for site in batches[0].activations
        },
        images=torch.cat([batch.images for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
    )


def in_order(
    filler: Filler,
    selection: Selection,
    images: Int64[np.ndarray, " image"],
    *,
    n_slots: int = 64,
) -> Iterator[TokenBatch]:
    """The selected tokens of some ascending images in order, ``n_slots`` images at a time."""
    n_slots = min(n_slots, max(1, len(images)))
    memory, never = memory_for(filler, n_slots), threading.Event()
    per_image = filler.positions.stop - filler.positions.start
    for start in range(0, len(images), n_slots):
        filled = filler.fill(images[start : start + n_slots], memory, never)
        drawn = selection.tokens_of(filled, per_image)
        rows = torch.from_numpy(filled)
        yield gather(memory, drawn, rows, first_position=filler.positions.start)
