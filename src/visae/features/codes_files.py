"""Sparse codes on disk: one safetensors file a store shard, readable in parts.

Each file holds ``offsets`` (int64, tokens + 1), ``features`` (int32) and ``values`` (float32).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from visae.errors import FeatureIndexError
from visae.features.record import CodesShard
from visae.saes.codes import SparseCodes
from visae.storage.tensors import FileRef, read_tensors, write_tensors

__all__ = ["read_codes", "read_shards", "read_tokens", "write_codes"]

_FIX = (
    "It was altered or cut short: delete it and run visae index again, which makes what is missing"
)


def write_codes(folder: Path, name: str, codes: SparseCodes) -> FileRef:
    """Write the codes of some tokens, atomically."""
    tensors = {
        "offsets": codes.offsets,
        "features": codes.features.int(),
        "values": codes.values.float(),
    }
    return write_tensors(folder, name, tensors)


def read_codes(path: Path, *, n_tokens: int, n_features: int) -> SparseCodes:
    """Read the codes of all tokens of a file.

    Raises:
        FeatureIndexError: when the file is missing, cut short or does not hold such codes.
    """
    tensors = read_tensors(path, error=FeatureIndexError)
    if set(tensors) != {"offsets", "features", "values"}:
        raise FeatureIndexError("This file does not hold sparse codes", where=path, fix=_FIX)
    codes = SparseCodes(
        tensors["offsets"], tensors["features"].long(), tensors["values"], n_features
    )
    if not _is_sound(codes, n_tokens):
        raise FeatureIndexError(
            f"These codes are not those of {n_tokens} tokens and {n_features} features",
            where=path,
            fix=_FIX,
        )
    return codes


def read_shards(
    folder: Path, shards: Sequence[CodesShard], *, tokens_per_image: int, n_features: int
) -> Iterator[SparseCodes]:
    """The codes of every file of an index, in order, one in memory at a time."""
    for shard in shards:
        n_tokens = shard.n_images * tokens_per_image
        yield read_codes(folder / shard.file.name, n_tokens=n_tokens, n_features=n_features)


def read_tokens(path: Path, tokens: slice, *, n_features: int) -> SparseCodes:
    """Read the codes of a run of tokens, and nothing else of the file.

    Raises:
        FeatureIndexError: when the file is missing, cut short or has fewer tokens.
    """
    try:
        with safe_open(path, framework="pt") as file:
            offsets = file.get_slice("offsets")[tokens.start : tokens.stop + 1]
            if offsets.shape[0] != tokens.stop - tokens.start + 1:
                raise FeatureIndexError("These codes are cut short", where=path, fix=_FIX)
            start, stop = int(offsets[0]), int(offsets[-1])
            features = file.get_slice("features")[start:stop]
            values = file.get_slice("values")[start:stop]
    except (OSError, SafetensorError) as failure:
        what = f"This is not a whole file of codes: {failure}"
        raise FeatureIndexError(what, where=path, fix=_FIX) from failure
    return SparseCodes(offsets - start, features.long(), values, n_features)


def _is_sound(codes: SparseCodes, n_tokens: int) -> bool:
    """Whether the offsets ascend to the number of entries and every feature exists."""
    offsets, features = codes.offsets, codes.features
    n_entries = features.shape[0]
    return (
        offsets.shape[0] == n_tokens + 1
        and int(offsets[0]) == 0
        and int(offsets[-1]) == n_entries == codes.values.shape[0]
        and bool((offsets.diff() >= 0).all())
        and bool(((features >= 0) & (features < codes.n_features)).all())
        and bool(torch.isfinite(codes.values).all())
    )
