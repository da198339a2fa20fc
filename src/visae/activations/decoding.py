"""Images read, scaled and cropped ahead of the model, by threads or by worker processes.

``decoded_images`` gives what the recorder and the live stream need of each image, in order.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from visae.errors import ImageError
from visae.images.source import ImageEntry, ImageSource, LoadedImage
from visae.models.layout import Layout
from visae.models.patch_labels import LabelledPatches, patch_labels
from visae.models.preprocessing import Preprocessing

__all__ = ["DecodedImage", "Decoding", "decoded_images", "default_workers"]

_N_THREADS = 4
_MOST_WORKERS = 16
_CHUNK = 4  # images a worker process reads at a time
_CHUNKS_PER_WORKER = 3  # under way, so that none waits for another


class DecodedImage(NamedTuple):
    """An image as the model sees it, and what is stored of it; the picture itself is dropped."""

    entry: ImageEntry
    """What its source says of it."""
    content_id: str
    """Content id of the image."""
    mask_id: str | None
    """Content id of its mask, where it has one."""
    view: UInt8[np.ndarray, "height width 3"]
    """What the model looks at."""
    patch_labels: Mapping[tuple[int, int], LabelledPatches]
    """The labels of its patches in each grid asked for; empty without a mask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How images are read."""

    source: ImageSource
    """Where they are."""
    preprocessing: Preprocessing
    """How they are scaled and cropped."""
    layouts: tuple[Layout, ...] = ()
    """Those whose patches masks are to be labelled on, one of each grid."""
    workers: int = 0
    """Processes that read them, 0 for threads of this process."""
    n_ahead: int = 64
    """How many to read ahead of use, at least."""

    def decode(self, entry: ImageEntry) -> "DecodedImage | ImageError":
        """Read one image, or give the reason why it cannot be read."""
        try:
            image = self.source.load(entry.ref)
            view = np.asarray(self.preprocessing.view(image.pixels), dtype=np.uint8)
            return DecodedImage(
                entry=image.entry or entry,
                content_id=image.content_id,
                mask_id=image.mask_id,
                view=view,
                patch_labels=self._patch_labels(image),
            )
        except ImageError as failure:
            return failure

    def _patch_labels(self, image: LoadedImage) -> dict[tuple[int, int], LabelledPatches]:
        if image.mask is None or not self.layouts:
            return {}
        mask = self.preprocessing.mask_view(image.mask)
        return {
            layout.grid: patch_labels(np.asarray(layout.seen(mask), dtype=np.int32), layout.grid)
            for layout in self.layouts
        }


def default_workers(*, on_gpu: bool, n_processes: int = 1) -> int:
    """Worker processes that keep a device busy.

    A model on the CPU needs every core itself, and threads do; a GPU is fed by all cores but one,
    shared among the recording processes of this machine.
    """
    n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, n_cores // n_processes - 1)) if on_gpu else 0


@contextlib.contextmanager
def decoded_images(
    decoding: Decoding, entries: Sequence[ImageEntry]
) -> Iterator[Iterator[DecodedImage | ImageError]]:
    """Within the block, the images in order, or the reason why one cannot be read.

    Nothing is left running after the block, nor when this process is killed.

    Raises:
        ImageError: when a worker process dies, naming the image that comes next.
    """
    size = _CHUNK if decoding.workers else 1
    chunks = (entries[start : start + size] for start in range(0, len(entries), size))
    n_ahead = max(1, decoding.n_ahead // size, _CHUNKS_PER_WORKER * decoding.workers)
    pool, decode = _pool(decoding)
    try:
        yield _in_order(pool, decode, chunks, n_ahead)
    finally:
        pool.shutdown(cancel_futures=True)


_Outcomes = list[DecodedImage | ImageError]
_Decode = Callable[[Sequence[ImageEntry]], _Outcomes]


def _pool(decoding: Decoding) -> tuple[Executor, _Decode]:
    if not decoding.workers:
        return ThreadPoolExecutor(_N_THREADS), functools.partial(_decode_all, decoding)
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        decoding.workers,
        mp_context=multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(decoding,),
    )
    with warnings.catch_warnings():  # workers touch no thread, lock or library of the parent
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pool.submit(_decode_in_worker, ())  # starts them all
    return pool, _decode_in_worker


def _in_order(
    pool: Executor, decode: _Decode, chunks: Iterator[Sequence[ImageEntry]], n_ahead: int
) -> Iterator[DecodedImage | ImageError]:
    """The images of the chunks, with so many chunks under way ahead of the one that is used."""
    waiting: collections.deque[tuple[str, Future[_Outcomes]]] = collections.deque()

    def submit(n_chunks: int) -> None:
        for chunk in itertools.islice(chunks, n_chunks):
            waiting.append((chunk[0].ref, pool.submit(decode, chunk)))

    try:
        submit(n_ahead)
        while waiting:
            ref, future = waiting.popleft()
            outcomes = future.result()
            submit(1)
            yield from outcomes
    except BrokenProcessPool as failure:
        raise ImageError(
            "A process that reads images died: killed, or out of memory",
            where=f"near image {ref}",
            fix="Run the same command again with fewer --workers, or --workers 0; it resumes",
        ) from failure


def _decode_all(decoding: Decoding, entries: Sequence[ImageEntry]) -> _Outcomes:
    return [decoding.decode(entry) for entry in entries]


_decoding_of_worker: list[Decoding] = []  # in a worker process: what it was started with


def _start_worker(decoding: Decoding) -> None:
    """Begin a worker process: ignore Ctrl-C, which its parent handles, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _decoding_of_worker.append(decoding)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _decode_in_worker(entries: Sequence[ImageEntry]) -> _Outcomes:
    return _decode_all(_decoding_of_worker[-1], entries)
