"""What a recording will write, settled before the first image is read, and what is there already.

``plan_store`` makes the first version of ``store.json``; ``begin`` writes it, or finds that an
interrupted recording of the same goes on; ``missing_shards`` is the work that is left.
"""

import shutil
from pathlib import Path
from typing import Any

import visae
from visae.activations.continuing import require_same_images
from visae.activations.format import (
    MaskClass,
    RecordConfig,
    ShardRecord,
    SiteRecord,
    StoreRecord,
    shard_name,
)
from visae.activations.resuming import images_per_shard
from visae.activations.statistics import token_kinds
from visae.errors import StoreError
from visae.images.location import replace_path
from visae.images.source import ImageSource, MaskedSource
from visae.models.config import ModelConfig
from visae.models.names import portable_model
from visae.models.protocol import VisionModel
from visae.progress import size_text
from visae.storage.differences import differences
from visae.storage.hashing import hash_json
from visae.storage.portable import portable
from visae.storage.records import read_record, to_plain, write_record

__all__ = [
    "GATHERED",
    "MOST_WAITING",
    "begin",
    "bytes_to_write",
    "check_space",
    "missing_shards",
    "plan_store",
    "read_shard_record",
    "recording_id",
    "shard_path",
]

GATHERED = ("images.parquet", "shards.json", "statistics.safetensors")
"""The files that completing a store makes of its shards."""

MOST_WAITING = 16
"""Shards whose statistics wait as files of their own before they are added up."""

_IMAGE_BYTES = 1024  # of an image's row in its shard's JSON and in the table of images
_PATCH_BYTES = 8  # of a patch's label and purity


def plan_store(
    source: ImageSource,
    model: VisionModel,
    out: Path,
    *,
    config: RecordConfig,
    model_config: ModelConfig,
) -> StoreRecord:
    """What ``store.json`` says until the store is complete.

    Raises:
        ModelError: when the model lacks a site, or the tokens that are to be kept.
    """
    sites = tuple(
        SiteRecord(name=name, d_model=model.d_model(name), layout=model.layout(name))
        for name in config.sites
    )
    per_image = sum(s.bytes_per_image(config.tokens, config.dtype) for s in sites) // len(sites)
    weights = model_config.weights
    return StoreRecord(
        visae_version=visae.__version__,
        model=portable_model(model_config.model, out),
        weights=None if weights is None else portable(weights, out),
        revision=model_config.revision,
        image_size=model_config.image_size,
        identity=model.identity,
        preprocessing=model.preprocessing,
        images=_portable_location(source.location, out),
        n_images_in_source=len(source.entries),
        images_per_shard=images_per_shard(config.shard_bytes, per_image),
        tokens=config.tokens,
        dtype=config.dtype,
        precision=config.precision,
        sites=sites,
        mask_classes=_mask_classes(source),
    )


def begin(out: Path, plan: StoreRecord, source: ImageSource) -> bool:
    """Write ``store.json``, or accept an equal one; False when there is nothing left to do.

    A recording that wrote nothing yet gives way to another.

    Raises:
        StoreError: when the folder, or one shard in it, is of another recording, or the list of
            images has changed since a shard was recorded.
    """
    path = out / "store.json"
    if not path.exists():
        write_record(path, plan)
        return True
    found = read_record(StoreRecord, path, error=StoreError)
    if changes := differences(_lasting(found), _lasting(plan)):
        if not any(inner.is_dir() for inner in out.iterdir()):
            write_record(path, plan)
            return True
        raise StoreError(
            f"This folder holds another recording ({'; '.join(changes[:4])})",
            where=out,
            fix="Choose another --out, or delete the folder",
        )
    missing = missing_shards(out, plan)
    _refuse_foreign_shards(out, plan, set(range(plan.n_shards)) - set(missing), source)
    gathered = all((out / name).is_file() for name in GATHERED)
    return bool(missing) or not (found.complete and gathered)


def missing_shards(out: Path, plan: StoreRecord) -> list[int]:
    """Shards that are not written yet."""
    shards = out / "shards"
    there = {path.name for path in shards.glob("*.json")} if shards.is_dir() else set()
    return [i for i in range(plan.n_shards) if f"{shard_name(i)}.json" not in there]


def shard_path(out: Path, index: int) -> Path:
    """The JSON file of a shard."""
    return out / "shards" / f"{shard_name(index)}.json"


def recording_id(plan: StoreRecord) -> str:
    """Hash of what is recorded, the same from the first shard to the complete store."""
    return hash_json(_lasting(plan))


def read_shard_record(out: Path, plan: StoreRecord, index: int) -> ShardRecord:
    """What a finished shard says of itself.

    Raises:
        StoreError: when it is of another recording, or does not list its images one by one.
    """
    path = shard_path(out, index)
    shard = read_record(ShardRecord, path, error=StoreError)
    if shard.recording != recording_id(plan) or shard.index != index:
        raise StoreError(
            "This shard belongs to another recording",
            where=path,
            fix="Delete it (or the folder) and run the same visae record command again; it resumes",
        )
    columns = [shard.refs, shard.labels, shard.groups, *shard.metadata.values()]
    lengths = {len(column) for column in [*columns, shard.mask_ids or shard.content_ids]}
    n_images = len(shard.content_ids)
    if lengths != {n_images} or n_images + len(shard.skipped) != plan.n_listed(index):
        raise StoreError(
            f"This shard does not list its {plan.n_listed(index)} images one by one",
            where=path,
            fix="It was altered or cut short: delete it and record again; that resumes",
        )
    return shard


def bytes_to_write(plan: StoreRecord, shards: list[int]) -> int:
    """Bytes on disk of some shards, at most, and of what is gathered from them."""
    n_images = sum(plan.n_listed(index) for index in shards)
    per_image = _IMAGE_BYTES
    per_image += sum(site.bytes_per_image(plan.tokens, plan.dtype) for site in plan.sites)
    if plan.mask_classes is not None:
        grids = {site.layout.grid for site in plan.sites}
        per_image += sum(_PATCH_BYTES * rows * columns for rows, columns in grids)
    n_statistics = min(len(shards), 2 * MOST_WAITING)
    return n_images * per_image + (n_statistics + 2) * _statistics_bytes(plan)


def check_space(out: Path, plan: StoreRecord, missing: list[int]) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        StoreError: saying how much is needed and how much is free.
    """
    needed, free = bytes_to_write(plan, missing), shutil.disk_usage(out).free
    if needed > free:
        raise StoreError(
            f"The store needs {size_text(needed)} more and the disk has {size_text(free)} free",
            where=out,
            fix="Free space, choose another --out, fewer sites or fewer images",
        )


def _statistics_bytes(plan: StoreRecord) -> int:
    """Bytes of the statistics of a shard, or of the store: float64."""
    numbers = 0
    for site in plan.sites:
        kinds = token_kinds(site.layout, plan.tokens)
        numbers += len(kinds) * (site.d_model**2 + 1001)
        numbers += site.layout.n_kept(plan.tokens) * (site.d_model + 1)
    return 8 * numbers


def _portable_location(location: str, out: Path) -> str:
    """A location with its path as the store's files write it; a made-up one stays as it is."""

    def change(path: str) -> str:
        return portable(Path(path), out) if Path(path).is_absolute() else path

    return replace_path(location, change)


def _mask_classes(source: ImageSource) -> tuple[MaskClass, ...] | None:
    if not isinstance(source, MaskedSource):
        return None
    return tuple(MaskClass(value=v, name=name) for v, name in sorted(source.mask_classes.items()))


def _lasting(record: StoreRecord) -> dict[str, Any]:
    """What must be equal for a recording to be continued: all but names and progress.

    Weights are known by their hash, whatever revision the hub calls them.
    """
    plain: dict[str, Any] = to_plain(record)
    del plain["contents"], plain["visae_version"]
    del plain["identity"]["title"], plain["identity"]["revision"]
    return plain


def _refuse_foreign_shards(
    out: Path, plan: StoreRecord, written: set[int], source: ImageSource
) -> None:
    n_listed = plan.images_per_shard
    for index in sorted(written):
        shard = read_shard_record(out, plan, index)
        rows = slice(index * n_listed, (index + 1) * n_listed)
        require_same_images(shard, source, rows, shard_path(out, index))
