"""Record a model's activations on images: the verb ``record``.

Shards are written one after another; a finished one is never touched again. Interrupt it at any
moment and run the same command: it goes on with the first missing shard, with an equal result.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import visae
from visae.activations.format import (
    RecordConfig,
    ShardRecord,
    SiteRecord,
    StoreRecord,
    shard_name,
)
from visae.activations.statistics import partial_sums
from visae.activations.store import ActivationStore
from visae.errors import ImageError, ModelError, StoreError
from visae.images.catalog import Skipped, write_skipped
from visae.images.source import ImageEntry, ImageSource, LoadedImage
from visae.models.config import ModelConfig
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.storage.atomic import disk_errors
from visae.storage.locks import exclusive
from visae.storage.portable import portable
from visae.storage.records import read_record, to_plain, write_record
from visae.storage.tensors import FileRef, write_tensors

__all__ = ["record"]

_DECODE_THREADS = 4


class _Loaded(NamedTuple):
    """An image of the source, read or skipped."""

    entry: ImageEntry
    image: LoadedImage | None
    reason: str


@dataclasses.dataclass(frozen=True)
class _Recording:
    """What stays the same from shard to shard."""

    source: ImageSource
    model: VisionModel
    out: Path
    plan: StoreRecord
    config: RecordConfig
    strict: bool
    progress: ProgressCallback


def record(
    source: ImageSource,
    model: VisionModel,
    out: Path,
    *,
    config: RecordConfig,
    model_config: ModelConfig,
    strict: bool = False,
    progress: ProgressCallback = silent,
) -> ActivationStore:
    """Write, or complete, the activation store of ``source`` under ``model`` in folder ``out``.

    Images that cannot be read are left out and listed with the reason in ``skipped.csv``; with
    ``strict`` the first one raises instead.

    Raises:
        StoreError: when ``out`` holds another recording (naming what differs), is being written
            by another process, or the disk cannot hold the store.
        ModelError: when the model gives NaN or infinite activations (naming image and site).
        ImageError: when no image can be read.
    """
    out = Path(out)
    plan = _plan(source, model, out, config, model_config)
    recording = _Recording(source, model, out, plan, config, strict, progress)
    with exclusive(out):
        if not _begin(out, plan):
            return ActivationStore(out)
        _check_space(out, plan, config)
        for index in range(plan.n_shards):
            if not (out / "shards" / f"{shard_name(index)}.json").is_file():
                _write_shard(recording, index)
        _finish(out, plan)
    return ActivationStore(out)


def _plan(
    source: ImageSource,
    model: VisionModel,
    out: Path,
    config: RecordConfig,
    model_config: ModelConfig,
) -> StoreRecord:
    """What the finished store will be."""
    sites = tuple(
        SiteRecord(name=name, d_model=model.d_model(name), layout=model.layout(name))
        for name in config.sites
    )
    widths = {s.name: (s.layout.n_kept(config.tokens), s.d_model) for s in sites}
    per_image = config.bytes_per_image(widths) // len(sites)
    weights = model_config.weights
    return StoreRecord(
        visae_version=visae.__version__,
        model=model_config.model,
        weights=None if weights is None else portable(weights, out),
        image_size=model_config.image_size,
        identity=model.identity,
        preprocessing=model.preprocessing,
        images=_portable_location(source.location, out),
        n_images_in_source=len(source.entries),
        images_per_shard=max(16, min(1024, config.shard_bytes // per_image)),
        tokens=config.tokens,
        dtype=config.dtype,
        sites=sites,
    )


def _portable_location(location: str, out: Path) -> str:
    path, _, query = location.partition("?")
    if ":" in path.split("/")[0] or not Path(path).exists():
        return location
    return portable(Path(path), out) + (f"?{query}" if query else "")


def _begin(out: Path, plan: StoreRecord) -> bool:
    """Write ``store.json``, or accept an equal one; False when there is nothing left to do."""
    path = out / "store.json"
    if not path.exists():
        write_record(path, plan)
        return True
    found = read_record(StoreRecord, path, error=StoreError)
    old, new = to_plain(found), to_plain(plan)
    different = [k for k in new if k not in ("complete", "visae_version") and old[k] != new[k]]
    if different:
        changes = "; ".join(f"{k}: {_short(old[k])} there, {_short(new[k])} now" for k in different)
        raise StoreError(
            f"This folder holds another recording ({changes})",
            where=out,
            fix="Choose another --out, or delete the folder",
        )
    return not found.complete


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _check_space(out: Path, plan: StoreRecord, config: RecordConfig) -> None:
    widths = {s.name: (s.layout.n_kept(plan.tokens), s.d_model) for s in plan.sites}
    n_done = sum(1 for _ in (out / "shards").glob("*.json"))
    images_left = plan.n_images_in_source - n_done * plan.images_per_shard
    needed = config.bytes_per_image(widths) * max(0, images_left)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise StoreError(
            f"The store needs {needed / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free",
            where=out,
            fix="Free space, choose another --out, fewer sites or fewer images",
        )


def _write_shard(recording: _Recording, index: int) -> None:
    plan = recording.plan
    start = index * plan.images_per_shard
    entries = recording.source.entries[start : start + plan.images_per_shard]
    kept: list[_Loaded] = []
    skipped: list[tuple[str, str]] = []
    parts: dict[str, list[Tensor]] = {site.name: [] for site in plan.sites}
    for batch in _batches(recording, entries, skipped):
        for site, activations in _activations(recording.model, plan, batch).items():
            parts[site].append(activations)
        kept.extend(batch)
        _report(recording, start + len(kept) + len(skipped))
    _save_shard(recording, index, parts, kept, skipped)


def _report(recording: _Recording, done: int) -> None:
    total = recording.plan.n_images_in_source
    recording.progress(Progress(stage="record", done=done, total=total, unit="images"))


def _batches(
    recording: _Recording, entries: Sequence[ImageEntry], skipped: list[tuple[str, str]]
) -> Iterator[list[_Loaded]]:
    """Readable images in order, in full batches, decoded by threads ahead of the model."""
    batch_size = recording.config.batch_size

    def load(entry: ImageEntry) -> _Loaded:
        try:
            return _Loaded(entry, recording.source.load(entry.ref), "")
        except ImageError as failure:
            if recording.strict:
                raise
            return _Loaded(entry, None, failure.what)

    batch: list[_Loaded] = []
    with ThreadPoolExecutor(_DECODE_THREADS) as threads:
        for start in range(0, len(entries), 8 * batch_size):
            for loaded in threads.map(load, entries[start : start + 8 * batch_size]):
                if loaded.image is None:
                    skipped.append((loaded.entry.ref, loaded.reason))
                    continue
                batch.append(loaded)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
    if batch:
        yield batch


def _activations(
    model: VisionModel, plan: StoreRecord, batch: Sequence[_Loaded]
) -> dict[str, Tensor]:
    """Kept tokens of a batch at every site, in the store's number format."""
    preprocessing = plan.preprocessing
    views = [preprocessing.view(item.image.pixels) for item in batch if item.image is not None]
    trace = model.trace(preprocessing.pixels(views), [site.name for site in plan.sites])
    dtype = getattr(torch, plan.dtype)
    stored = {}
    for site in plan.sites:
        kept = trace.tokens[site.name][:, site.layout.kept(plan.tokens)].to("cpu", dtype)
        finite = torch.isfinite(kept).all(dim=2).all(dim=1)
        if not finite.all():
            bad = batch[int((~finite).nonzero()[0])].entry.ref
            raise ModelError(
                f"The model gives NaN or infinite activations at {site.name} for image {bad}",
                where=plan.identity.name,
                fix="Look at that image and the weights; float16 overflows: try --dtype bfloat16",
            )
        stored[site.name] = kept
    return stored


def _save_shard(
    recording: _Recording,
    index: int,
    parts: dict[str, list[Tensor]],
    kept: Sequence[_Loaded],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Write a shard's tensors, then its JSON: the shard exists from then on."""
    out, plan, name = recording.out, recording.plan, shard_name(index)
    files: dict[str, FileRef] = {}
    sums: dict[str, Tensor] = {}
    for site in plan.sites:
        empty = torch.empty(0, site.layout.n_kept(plan.tokens), site.d_model)
        activations = torch.cat([empty.to(getattr(torch, plan.dtype)), *parts[site.name]])
        files[site.name] = write_tensors(
            out, f"{site.name}/{name}.safetensors", {"activations": activations}
        )
        partial = partial_sums(activations)
        sums |= {f"{site.name}/{key}": value for key, value in partial.items()}
    images = [item.image for item in kept if item.image is not None]
    record = ShardRecord(
        index=index,
        content_ids=tuple(image.content_id for image in images),
        refs=tuple(item.entry.ref for item in kept),
        labels=tuple(item.entry.label for item in kept),
        groups=tuple(item.entry.group for item in kept),
        skipped=tuple(skipped),
        files=files,
        statistics=write_tensors(out, f"shards/{name}.safetensors", sums),
    )
    write_record(out / "shards" / f"{name}.json", record)


def _finish(out: Path, plan: StoreRecord) -> None:
    """Write the list of skipped images and mark the store complete."""
    skipped: list[Skipped] = []
    n_kept = 0
    for index in range(plan.n_shards):
        path = out / "shards" / f"{shard_name(index)}.json"
        shard = read_record(ShardRecord, path, error=StoreError)
        skipped += [Skipped(ref=ref, reason=reason) for ref, reason in shard.skipped]
        n_kept += len(shard.content_ids)
    with disk_errors(out):
        write_skipped(out / "skipped.csv", skipped)
    if n_kept == 0:
        raise ImageError(
            f"None of the {plan.n_images_in_source} images can be read; the first: "
            f"{skipped[0].ref}: {skipped[0].reason}",
            where=plan.images,
            fix=f"Mend the images listed in {out / 'skipped.csv'}",
        )
    write_record(out / "store.json", dataclasses.replace(plan, complete=True))
