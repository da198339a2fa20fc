"""Reading the tokens of whole images from shard files straight into given memory.

A store says where the tokens of a site lie (``TokenFile``); ``TokenReader`` reads any images of it
by few large positioned reads, without a copy in between. The loaders are built on it.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from visae.errors import StoreError

__all__ = ["TokenFile", "TokenReader", "tensor_file"]

_FIX = "It was altered or cut short: run visae doctor on the store"
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_LONGEST_HEADER = 2**20
_LARGEST_GAP = 2**16  # bytes between two images that are read over rather than skipped
_IMAGES_PER_READ = 512  # twice as many pieces of memory, of which a system takes 1024


class TokenFile(NamedTuple):
    """A file with tokens of some images of a store at one site."""

    path: Path
    """The file."""
    start: int
    """Position of the first image's first token, in bytes."""
    n_images: int
    """Images in the file."""
    stride: int
    """Bytes from an image's first token to the next image's."""


def tensor_file(path: Path, name: str, shape: Sequence[int], dtype: str) -> TokenFile:
    """Where a safetensors file keeps a tensor (image, token, d_model), from its header.

    Raises:
        StoreError: when the file is missing or cut short, or holds another tensor.
    """
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(n_header, _LONGEST_HEADER)))
            n_bytes = os.fstat(file.fileno()).st_size
        entry = header[name]
        found = entry["dtype"], tuple(entry["shape"])
        first, last = (8 + n_header + int(offset) for offset in entry["data_offsets"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as failure:
        raise StoreError(
            f"This is not a whole shard: {type(failure).__name__} {failure}", where=path, fix=_FIX
        ) from failure
    wanted = _SAFETENSORS_NAMES[dtype], tuple(shape)
    if found != wanted:
        what = f"This shard holds {_described(*found)} instead of {_described(*wanted)}"
        raise StoreError(what, where=path, fix=_FIX)
    if last > n_bytes or last - first != math.prod(shape) * getattr(torch, dtype).itemsize:
        what = f"This shard ends after {n_bytes} of {last} bytes"
        raise StoreError(what, where=path, fix=_FIX)
    return TokenFile(path, first, shape[0], (last - first) // max(1, shape[0]))


def _described(dtype: object, shape: object) -> str:
    return f"{dtype} {shape}"


class _Stretch(NamedTuple):
    """Neighbouring images of a file, and where they go among the images wanted."""

    first: int
    """The first of them within the file."""
    n_images: int
    target: int


class TokenReader:
    """Reads tokens of whole images of one site.

    Args:
        files: The site's files; the images of a store are numbered through them in order.
        skip_bytes: Bytes of each image before the tokens to read.
        image_bytes: Bytes of each image to read.
    """

    def __init__(self, files: Sequence[TokenFile], *, skip_bytes: int, image_bytes: int) -> None:
        self._files, self._skip, self._image_bytes = list(files), skip_bytes, image_bytes
        self._ends = np.cumsum([0, *(file.n_images for file in files)])[1:]

    def read(
        self,
        images: Int64[np.ndarray, " image"],
        into: Float[Tensor, "image token d_model"],
        threads: Executor,
    ) -> None:
        """Fill ``into`` with the tokens of some ascending images, files in parallel.

        Raises:
            StoreError: when a file is missing or ends too early.
        """
        if len(images) == 0:
            return
        memory = into.view(torch.uint8).numpy().data.cast("B")
        reads = [
            threads.submit(self._read_file, file, stretches, memory)
            for file, stretches in self._stretches(images)
        ]
        for read in reads:
            read.result()

    def _stretches(
        self, images: Int64[np.ndarray, " image"]
    ) -> Iterator[tuple[TokenFile, list[_Stretch]]]:
        """The runs of neighbouring images of each file that has some."""
        in_file = np.searchsorted(self._ends, images, side="right")
        breaks = np.flatnonzero((np.diff(images) != 1) | (np.diff(in_file) != 0)) + 1
        starts = np.concatenate([[0], breaks, [len(images)]]).tolist()
        pieces = ((int(in_file[a]), a, b) for a, b in itertools.pairwise(starts) if a < b)
        for number, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
            file = self._files[number]
            before = int(self._ends[number]) - file.n_images
            yield file, [_Stretch(int(images[a]) - before, b - a, a) for _, a, b in group]

    def _read_file(
        self, file: TokenFile, stretches: Sequence[_Stretch], memory: memoryview
    ) -> None:
        try:
            descriptor = os.open(file.path, os.O_RDONLY)
        except OSError as failure:
            what = f"A shard cannot be opened: {failure.strerror}"
            raise StoreError(what, where=file.path, fix=_FIX) from failure
        try:
            for stretch in stretches:
                for pieces, position in self._pieces(file, stretch, memory):
                    _read_fully(descriptor, pieces, position, file.path)
        finally:
            os.close(descriptor)

    def _pieces(
        self, file: TokenFile, stretch: _Stretch, memory: memoryview
    ) -> Iterator[tuple[list[memoryview], int]]:
        """Memory to fill by one read, and the position in the file it begins at."""
        size, gap = self._image_bytes, file.stride - self._image_bytes
        per_read = stretch.n_images if gap == 0 else _IMAGES_PER_READ if gap <= _LARGEST_GAP else 1
        unwanted = memoryview(bytearray(gap if per_read > 1 else 0))
        for done in range(0, stretch.n_images, per_read):
            n_images = min(per_read, stretch.n_images - done)
            target = (stretch.target + done) * size
            position = file.start + (stretch.first + done) * file.stride + self._skip
            if gap == 0:
                yield [memory[target : target + n_images * size]], position
                continue
            pieces = []
            for at in range(target, target + n_images * size, size):
                pieces += [memory[at : at + size], unwanted]
            yield pieces[:-1], position


def _read_fully(descriptor: int, pieces: list[memoryview], position: int, path: Path) -> None:
    """Fill all pieces of memory, one after the other, from a position of a file."""
    pieces = [piece for piece in pieces if piece.nbytes]
    while pieces:
        try:
            n_read = os.preadv(descriptor, pieces, position)
        except OSError as failure:
            what = f"A shard cannot be read: {failure.strerror}"
            raise StoreError(what, where=path, fix="Check the disk, then run it again") from failure
        if n_read == 0:
            raise StoreError("This shard ends too early", where=path, fix=_FIX)
        position += n_read
        n_full = 0
        while n_full < len(pieces) and n_read >= pieces[n_full].nbytes:
            n_read -= pieces[n_full].nbytes
            n_full += 1
        pieces = pieces[n_full:]
        if n_read:
            pieces[0] = pieces[0][n_read:]
