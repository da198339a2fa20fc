"""A recording's last step: gather what every shard says, and say that the store is complete.

The checksums of what is gathered go into ``store.json`` last; whoever opens the store then needs
no more than that and ``shards.json``.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visae.activations.format import (
    ShardFiles,
    ShardRecord,
    ShardTable,
    StoreContents,
    StoreRecord,
    shard_name,
)
from visae.activations.planning import GATHERED, read_shard_record
from visae.activations.summing import forget_sums, statistics_tensors, sums_of_store
from visae.errors import ImageError, StoreError
from visae.images.catalog import ImageTable, Skipped, write_skipped
from visae.storage.atomic import disk_errors
from visae.storage.hashing import hash_json
from visae.storage.records import read_record, write_record
from visae.storage.tensors import FileRef, file_ref, verify_file, write_tensors

__all__ = ["complete", "digest_of"]

_IMAGES, _SHARDS, _STATISTICS = GATHERED


def complete(out: Path, plan: StoreRecord, *, batch_size: int) -> None:
    """Gather the shards of a store, all of which are written, and mark it complete.

    ``batch_size`` is that of the recording: it decides the order in which sums are taken again
    where a shard's statistics are no longer there.

    Raises:
        StoreError: when a shard is not of this recording, or the disk is full.
        ImageError: when no image could be read; nothing stays but the list of skipped images.
    """
    shards = [read_shard_record(out, plan, index) for index in range(plan.n_shards)]
    skipped = [Skipped(ref, reason) for shard in shards for ref, reason in shard.skipped]
    with disk_errors(out):
        write_skipped(out / "skipped.csv", skipped)
    if not any(shard.content_ids for shard in shards):
        _clear(out, plan)
        raise ImageError(
            f"None of the {plan.n_images_in_source} images can be read; the first: "
            f"{skipped[0].ref}: {skipped[0].reason}",
            where=plan.images,
            fix=f"Mend the images listed in {out / 'skipped.csv'}",
        )
    images = _image_table(shards)
    images.write(out / _IMAGES)
    files = tuple(_files(out, shard) for shard in shards)
    statistics = _kept_statistics(out, files) or _statistics(out, plan, batch_size)
    write_record(out / _SHARDS, ShardTable(shards=files))
    contents = StoreContents(
        n_images=len(images),
        digest=digest_of(images.content_ids, files),
        images=file_ref(out, _IMAGES),
        statistics=statistics,
        shards=file_ref(out, _SHARDS),
    )
    write_record(out / "store.json", dataclasses.replace(plan, contents=contents))
    forget_sums(out, plan)


def digest_of(content_ids: Sequence[str], shards: Sequence[ShardFiles]) -> str:
    """Hash of a store's images and activations: equal for equal recordings, wherever they are."""
    files = [[shard.files[site].sha256 for site in sorted(shard.files)] for shard in shards]
    return hash_json([content_ids, files])


def _image_table(shards: Sequence[ShardRecord]) -> ImageTable:
    """The images of all shards, in order."""

    def joined(columns: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(value for column in columns for value in column)

    names = dict.fromkeys(name for shard in shards for name in shard.metadata)
    nothing = [(None,) * len(shard.content_ids) for shard in shards]
    pairs = list(zip(shards, nothing, strict=True))
    has_masks = any(shard.mask_ids for shard in shards)
    return ImageTable(
        content_ids=joined([shard.content_ids for shard in shards]),
        refs=joined([shard.refs for shard in shards]),
        labels=joined([shard.labels for shard in shards]),
        groups=joined([shard.groups for shard in shards]),
        mask_ids=joined([s.mask_ids or none for s, none in pairs]) if has_masks else (),
        metadata={
            name: joined([s.metadata.get(name, none) for s, none in pairs]) for name in names
        },
    )


def _files(out: Path, shard: ShardRecord) -> ShardFiles:
    return ShardFiles(
        n_images=len(shard.content_ids),
        record=file_ref(out, f"shards/{shard_name(shard.index)}.json"),
        files=shard.files,
        patch_labels=shard.patch_labels,
    )


def _kept_statistics(out: Path, files: Sequence[ShardFiles]) -> FileRef | None:
    """The statistics of a store that was complete before, if they are of the same activations."""
    before = read_record(StoreRecord, out / "store.json", error=StoreError).contents
    if before is None:
        return None
    try:
        for ref in (before.shards, before.statistics):
            verify_file(out, ref)
    except StoreError:
        return None
    recorded = read_record(ShardTable, out / before.shards.name, error=StoreError).shards
    unchanged = [shard.files for shard in recorded] == [shard.files for shard in files]
    return before.statistics if unchanged else None


def _statistics(out: Path, plan: StoreRecord, batch_size: int) -> FileRef:
    sums = sums_of_store(out, plan, batch_size=batch_size)
    return write_tensors(out, _STATISTICS, statistics_tensors(sums))


def _clear(out: Path, plan: StoreRecord) -> None:
    """Remove a store without images, so that nothing stands in the way of the next attempt."""
    with disk_errors(out):
        (out / "store.json").unlink()
        for name in ("shards", "labels", *(site.name for site in plan.sites)):
            shutil.rmtree(out / name, ignore_errors=name == "labels")
