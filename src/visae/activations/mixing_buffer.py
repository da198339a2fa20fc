"""The mixing buffer: random images go in whole, batches of mixed tokens come out.

The memory is two halves: one is filled by a background thread while batches are drawn from the
other. Where all images fit they are put in once and stay, and each pass only draws them in a new
order. What fills it (files of a store, or a model that runs on images) is a ``Filler``.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from visae.activations.filling import Filler, TokenBatch, gather, joined, memory_for
from visae.activations.mixing import seeded
from visae.activations.selection import Selection
from visae.errors import StoreError

__all__ = ["LoaderState", "MixedTokens", "default_buffer_bytes"]

_FEWEST_RUNS = 8
_SMALLEST_DEFAULT, _LARGEST_DEFAULT = 2**30, 4 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where a stream of shuffled tokens stands: where its next token comes from."""

    n_pass: int = 0
    """Passes over the images finished."""
    fill: int = 0
    """Fillings of the buffer used up in this pass."""
    n_tokens: int = 0
    """Tokens of this filling handed out."""


class _Job(NamedTuple):
    """One filling of the buffer: which, and with what."""

    n_pass: int
    number: int
    images: Int64[np.ndarray, " image"]


class _Fill(NamedTuple):
    """A filled half, ready to be drawn from."""

    n_pass: int
    number: int
    half: int
    images: Int64[Tensor, " slot"]
    order: Int64[Tensor, " token"]


@final
class MixedTokens:
    """Endless batches of mixed tokens, resumable at any batch.

    Batches run on from one filling of the buffer, and from one pass, into the next: in each pass
    every token comes exactly once.

    Args:
        filler: Where tokens come from.
        selection: Which of them.
        batch_size: Tokens in a batch.
        buffer_bytes: Memory for the buffer; None: ``default_buffer_bytes``.
        seed: Fixes the order.

    Raises:
        StoreError: when the selection, or a half of the buffer, has fewer tokens than a batch.
    """

    def __init__(
        self,
        filler: Filler,
        selection: Selection,
        *,
        batch_size: int,
        buffer_bytes: int | None,
        seed: int,
    ) -> None:
        self._filler, self._selection = filler, selection
        self._batch_size, self._seed = batch_size, seed
        self._per_image = filler.positions.stop - filler.positions.start
        n_images = len(selection.images)
        image_bytes = self._per_image * sum(filler.widths.values()) * filler.dtype.itemsize
        if buffer_bytes is None:
            buffer_bytes = default_buffer_bytes(batch_size, image_bytes)
        n_fitting = buffer_bytes // image_bytes
        self._n_halves = 1 if n_images <= n_fitting else 2
        self._capacity = min(n_images, n_fitting) if self._n_halves == 1 else n_fitting // 2
        self._check_size(n_images, image_bytes)
        self._n_fills = -(-n_images // self._capacity)
        self._capacity = -(-n_images // self._n_fills)
        self._memory: list[dict[str, Tensor]] = []
        self._held: dict[int, _Fill] = {}
        self.state = LoaderState()

    def __iter__(self) -> Generator[TokenBatch]:
        pieces: list[TokenBatch] = []
        n_missing, start = self._batch_size, self.state.n_tokens
        with contextlib.closing(self._fills()) as fills:
            for fill in fills:
                while start < len(fill.order):
                    drawn = fill.order[start : start + n_missing]
                    pieces.append(self._batch(fill, drawn))
                    start, n_missing = start + len(drawn), n_missing - len(drawn)
                    if n_missing == 0:
                        self.state = self._state_after(fill, start)
                        yield joined(pieces)
                        pieces, n_missing = [], self._batch_size
                start = 0

    def _fills(self) -> Generator[_Fill]:
        """Fillings in order from the state's one, the next being made while one is used."""
        stop, jobs = threading.Event(), self._jobs()
        worker = ThreadPoolExecutor(1, thread_name_prefix="visae-mixing")
        ahead = worker.submit(self._make, next(jobs), stop)
        try:
            while True:
                fill = ahead.result()
                ahead = worker.submit(self._make, next(jobs), stop)
                yield fill
        finally:
            stop.set()
            ahead.cancel()
            worker.shutdown()

    def _jobs(self) -> Iterator[_Job]:
        """What each filling is made of, from the state's one on."""
        n_pass, first = self.state.n_pass, self.state.fill
        while True:
            images, n_images = self._permuted(n_pass), len(self._selection.images)
            for number in range(first, self._n_fills):
                start, stop = (k * n_images // self._n_fills for k in (number, number + 1))
                yield _Job(n_pass, number, np.sort(images[start:stop]))
            n_pass, first = n_pass + 1, 0

    def _permuted(self, n_pass: int) -> Int64[np.ndarray, " image"]:
        """All images in the random order of a pass, in which runs of neighbours stay together."""
        images = self._selection.images
        per_run = min(self._filler.images_per_run, max(1, self._capacity // _FEWEST_RUNS))
        n_runs = max(1, len(images) // per_run)
        rank = torch.randperm(n_runs, generator=seeded(self._seed, n_pass, 0)).numpy()
        run_of_image = np.arange(len(images)) * n_runs // len(images)
        permuted: np.ndarray = images[rank[run_of_image].argsort(kind="stable")]
        return permuted

    def _make(self, job: _Job, stop: threading.Event) -> _Fill:
        """Fill the half that is not in use, unless it holds these images already."""
        half = (job.n_pass * self._n_fills + job.number) % self._n_halves
        held = self._held.get(half)
        if held is not None and (held.n_pass, held.number) == (job.n_pass, job.number):
            return held
        if held is not None and self._n_halves == 1:
            images = held.images
        else:
            self._held.pop(half, None)
            images = torch.from_numpy(self._filler.fill(job.images, self._half(half), stop))
            if stop.is_set() and len(images) < len(job.images):
                raise CancelledError  # given up half way: not to be held for a filling
        generator = seeded(self._seed, job.n_pass, 1 + job.number)
        order = self._selection.order(images.numpy(), self._per_image, generator=generator)
        self._held[half] = _Fill(job.n_pass, job.number, half, images, order)
        return self._held[half]

    def _half(self, half: int) -> dict[str, Tensor]:
        """The memory of a half, got from the system when it is first needed."""
        while len(self._memory) <= half:
            self._memory.append(memory_for(self._filler, self._capacity))
        return self._memory[half]

    def _batch(self, fill: _Fill, drawn: Int64[Tensor, " token"]) -> TokenBatch:
        memory = self._memory[fill.half]
        return gather(memory, drawn, fill.images, first_position=self._filler.positions.start)

    def _state_after(self, fill: _Fill, n_tokens: int) -> LoaderState:
        if n_tokens < len(fill.order):
            return LoaderState(n_pass=fill.n_pass, fill=fill.number, n_tokens=n_tokens)
        if fill.number + 1 < self._n_fills:
            return LoaderState(n_pass=fill.n_pass, fill=fill.number + 1)
        return LoaderState(n_pass=fill.n_pass + 1)

    def _check_size(self, n_images: int, image_bytes: int) -> None:
        if (n_tokens := self._selection.n_tokens) < self._batch_size:
            raise StoreError(
                f"A batch of {self._batch_size} tokens is more than the {n_tokens} tokens there "
                "are",
                fix="Give a smaller --batch-size, select more, or record more images",
            )
        if (n_held := self._capacity * self._per_image) < self._batch_size:
            needed = 2 * -(-self._batch_size // self._per_image) * image_bytes
            raise StoreError(
                f"A batch of {self._batch_size} tokens is more than the {n_held} tokens that half "
                "the mixing buffer holds",
                fix=f"Give a buffer of {-(-needed // 2**20)} MiB with --buffer-mb, or a smaller "
                "--batch-size",
            )


def default_buffer_bytes(batch_size: int, image_bytes: int) -> int:
    """So much that half of it holds an image for each token of a batch, within 1 and 4 GiB.

    Batches are then as mixed as if they were drawn from all images at random.
    """
    return min(_LARGEST_DEFAULT, max(_SMALLEST_DEFAULT, 2 * batch_size * image_bytes))
