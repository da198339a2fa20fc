"""The statistics of a store, added up from those of its shards in their order.

Each shard's statistics are a file of their own until they are added. That is done now and then
while a store is recorded, so that the disk never holds many: ``add_ready`` adds what comes next in
order to ``statistics.partial.safetensors``. Sums are always taken one shard after another, and so
come out the same however often a recording was interrupted.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from visae.activations.format import StoreRecord, shard_name
from visae.activations.planning import MOST_WAITING, read_shard_record, shard_path
from visae.activations.statistics import SiteStatistics, token_kinds
from visae.storage.atomic import disk_errors
from visae.storage.tensors import read_tensors, verify_file, write_tensors

__all__ = ["add_ready", "forget_sums", "require_sums_of", "statistics_tensors", "sums_of_store"]

_PARTIAL = "statistics.partial.safetensors"
_N_ADDED = "n_shards"

_Sums = dict[str, SiteStatistics]  # by SITE/KIND


def statistics_tensors(sums: Mapping[str, SiteStatistics]) -> dict[str, Tensor]:
    """Statistics by ``SITE/KIND`` as the tensors of a file."""
    return {name: t for key, each in sums.items() for name, t in each.tensors(f"{key}/").items()}


def add_ready(out: Path, plan: StoreRecord) -> None:
    """Add the statistics that come next in order, once many wait, and remove their files.

    Raises:
        StoreError: when one was altered, or the disk is full.
    """
    n_added, sums = _added(out)
    ready = n_added
    while ready < plan.n_shards and _waits(out, ready):
        ready += 1
    if ready - n_added < MOST_WAITING:
        return
    for index in range(n_added, ready):
        sums = _plus(sums, _as_recorded(out, plan, index))
    write_tensors(out, _PARTIAL, statistics_tensors(sums) | {_N_ADDED: torch.tensor(ready)})
    _remove_files(out, ready)


def sums_of_store(out: Path, plan: StoreRecord, *, batch_size: int) -> _Sums:
    """The statistics over all shards, all of which are written.

    Those of a shard that are no longer there are taken again from its activations, in batches of
    ``batch_size`` images as when it was recorded.

    Raises:
        StoreError: when a file is missing, altered or cut short.
    """
    n_added, sums = _added(out)
    for index in range(n_added, plan.n_shards):
        if _waits(out, index):
            sums = _plus(sums, _as_recorded(out, plan, index))
        else:
            sums = _plus(sums, _taken_again(out, plan, index, batch_size))
    return sums


def require_sums_of(out: Path, missing: Sequence[int]) -> None:
    """Forget what was added up if it contains a shard that is now missing."""
    n_added, _ = _added(out)
    if missing and missing[0] < n_added:
        with disk_errors(out):
            (out / _PARTIAL).unlink()


def forget_sums(out: Path, plan: StoreRecord) -> None:
    """Remove what the statistics of the complete store contain."""
    with disk_errors(out):
        (out / _PARTIAL).unlink(missing_ok=True)
    _remove_files(out, plan.n_shards)


def _file(out: Path, index: int) -> Path:
    return out / "shards" / f"{shard_name(index)}.safetensors"


def _waits(out: Path, index: int) -> bool:
    """Whether a shard is written and its statistics are there."""
    return shard_path(out, index).is_file() and _file(out, index).is_file()


def _added(out: Path) -> tuple[int, _Sums]:
    """How many shards were added up, and their statistics."""
    if not (out / _PARTIAL).is_file():
        return 0, {}
    tensors = read_tensors(out / _PARTIAL)
    n_added = int(tensors.pop(_N_ADDED))
    return n_added, _of_tensors(tensors)


def _of_tensors(tensors: Mapping[str, Tensor]) -> _Sums:
    keys = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    return {key: SiteStatistics.of_tensors(tensors, f"{key}/") for key in keys}


def _plus(sums: _Sums, more: _Sums) -> _Sums:
    return {key: sums[key].plus(part) if key in sums else part for key, part in more.items()}


def _remove_files(out: Path, n_shards: int) -> None:
    with disk_errors(out):
        for index in range(n_shards):
            _file(out, index).unlink(missing_ok=True)


def _as_recorded(out: Path, plan: StoreRecord, index: int) -> _Sums:
    """A shard's statistics from their file."""
    verify_file(out, read_shard_record(out, plan, index).statistics)
    return _of_tensors(read_tensors(_file(out, index)))


def _taken_again(out: Path, plan: StoreRecord, index: int, batch_size: int) -> _Sums:
    """A shard's statistics from its activations, batch by batch as when it was recorded."""
    shard = read_shard_record(out, plan, index)
    found = {}
    for site in plan.sites:
        file = shard.files[site.name]
        verify_file(out, file)
        activations = read_tensors(out / file.name)["activations"]
        rounding = torch.tensor(shard.rounding[site.name], dtype=torch.float64)
        for kind, at in token_kinds(site.layout, plan.tokens).items():
            batches = torch.split(activations[:, at], batch_size)
            whole = functools.reduce(SiteStatistics.plus, map(SiteStatistics.of, batches))
            found[f"{site.name}/{kind}"] = dataclasses.replace(
                whole, rounding_square_sum=rounding[at]
            )
    return found
