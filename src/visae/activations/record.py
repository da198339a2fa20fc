"""Record a model's activations on images: the verb ``record``.

Shards are written one after another; a finished one is never touched again. Interrupt it at any
moment and run the same command: it goes on with the first missing shard, with an equal result.
"""

import collections
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from visae.images.source import ImageEntry, ImageSource
from visae.models.config import ModelConfig
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.storage.atomic import disk_errors, remove_leftovers
from visae.storage.differences import differences
from visae.storage.locks import exclusive
from visae.storage.portable import portable
from visae.storage.records import read_record, to_plain, write_record
from visae.storage.tensors import FileRef, write_tensors

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["record"]

_DECODE_THREADS = 4


class _Seen(NamedTuple):
    """An image as the model sees it; the picture itself is dropped at once."""

    entry: ImageEntry
    content_id: str
    view: "Image.Image"


class _Batch(NamedTuple):
    """Some images and, at each site, their kept tokens in the store's number format."""

    images: list[_Seen]
    activations: dict[str, Tensor]
    rounding: dict[str, Tensor]
    """Σ‖stored − computed‖² over the images, at each site and token."""


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
        ImageError: when there is no image, or none can be read; nothing stays but the list of
            skipped images, so that the same command starts anew once they are mended.
    """
    out = Path(out)
    if not source.entries:
        raise ImageError("There are no images", where=source.location, fix="Give other --images")
    plan = _plan(source, model, out, config, model_config)
    recording = _Recording(source, model, out, plan, config, strict, progress)
    with exclusive(out):
        remove_leftovers(out)
        if not _begin(out, plan):
            return ActivationStore(out)
        _check_space(out, plan, config)
        for index in _missing(out, plan):
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
    if changes := differences(_lasting(found), _lasting(plan)):
        raise StoreError(
            f"This folder holds another recording ({'; '.join(changes[:4])})",
            where=out,
            fix="Choose another --out, or delete the folder",
        )
    return not found.complete or bool(_missing(out, plan))


def _lasting(record: StoreRecord) -> dict[str, Any]:
    """What must be equal for a recording to be continued: all but names and progress."""
    plain: dict[str, Any] = to_plain(record)
    del plain["complete"], plain["visae_version"], plain["identity"]["title"]
    return plain


def _missing(out: Path, plan: StoreRecord) -> list[int]:
    """Shards that are not written yet."""
    return [i for i in range(plan.n_shards) if not _shard_path(out, i).is_file()]


def _shard_path(out: Path, index: int) -> Path:
    return out / "shards" / f"{shard_name(index)}.json"


def _check_space(out: Path, plan: StoreRecord, config: RecordConfig) -> None:
    widths = {s.name: (s.layout.n_kept(plan.tokens), s.d_model) for s in plan.sites}
    n, per_shard = plan.n_images_in_source, plan.images_per_shard
    images_left = sum(min(per_shard, n - i * per_shard) for i in _missing(out, plan))
    needed = config.bytes_per_image(widths) * images_left
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
    skipped: list[tuple[str, str]] = []
    batches: list[_Batch] = []
    n_kept = 0
    for images in _image_batches(recording, entries, skipped):
        batches.append(_run(recording.model, plan, images))
        n_kept += len(images)
        _report(recording, start + n_kept + len(skipped))
    _save_shard(recording, index, batches, skipped)


def _report(recording: _Recording, done: int) -> None:
    total = recording.plan.n_images_in_source
    recording.progress(Progress(stage="record", done=done, total=total, unit="images"))


def _image_batches(
    recording: _Recording, entries: Sequence[ImageEntry], skipped: list[tuple[str, str]]
) -> Iterator[list[_Seen]]:
    """Readable images in order, in full batches; what cannot be read is added to ``skipped``."""
    batch: list[_Seen] = []
    for entry, future in _read_ahead(recording, entries):
        try:
            batch.append(future.result())
        except ImageError as failure:
            if recording.strict:
                raise
            skipped.append((entry.ref, failure.what))
        if len(batch) == recording.config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_ahead(
    recording: _Recording, entries: Sequence[ImageEntry]
) -> Iterator[tuple[ImageEntry, Future[_Seen]]]:
    """Images in order, read and scaled by threads up to two batches ahead of the model."""

    def see(entry: ImageEntry) -> _Seen:
        image = recording.source.load(entry.ref)
        return _Seen(entry, image.content_id, recording.plan.preprocessing.view(image.pixels))

    n_ahead = 2 * recording.config.batch_size
    waiting: collections.deque[tuple[ImageEntry, Future[_Seen]]] = collections.deque()
    threads = ThreadPoolExecutor(_DECODE_THREADS)
    try:
        for entry in entries:
            waiting.append((entry, threads.submit(see, entry)))
            if len(waiting) > n_ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        threads.shutdown(cancel_futures=True)


def _run(model: VisionModel, plan: StoreRecord, images: list[_Seen]) -> _Batch:
    """Run the model on a batch and keep what the store keeps."""
    pixels = plan.preprocessing.pixels([image.view for image in images])
    trace = model.trace(pixels, [site.name for site in plan.sites])
    activations, rounding = {}, {}
    for site in plan.sites:
        computed = trace.tokens[site.name][:, site.layout.kept(plan.tokens)].cpu()
        stored = computed.to(getattr(torch, plan.dtype))
        finite = torch.isfinite(stored).flatten(1).all(dim=1)
        if not finite.all():
            bad = images[int((~finite).nonzero()[0])].entry.ref
            raise ModelError(
                f"The model gives NaN or infinite activations at {site.name} for image {bad}",
                where=plan.identity.name,
                fix="Look at that image and the weights; float16 overflows: try --dtype bfloat16",
            )
        activations[site.name] = stored
        error = stored.float() - computed
        rounding[site.name] = error.square().sum(dim=(0, 2), dtype=torch.float64)
    return _Batch(images, activations, rounding)


def _save_shard(
    recording: _Recording,
    index: int,
    batches: Sequence[_Batch],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Write a shard's tensors, then its JSON: the shard exists from then on."""
    out, plan, name = recording.out, recording.plan, shard_name(index)
    files: dict[str, FileRef] = {}
    sums: dict[str, Tensor] = {}
    for site in plan.sites:
        n_tokens = site.layout.n_kept(plan.tokens)
        empty = torch.empty((0, n_tokens, site.d_model), dtype=getattr(torch, plan.dtype))
        activations = torch.cat([empty, *(batch.activations[site.name] for batch in batches)])
        files[site.name] = write_tensors(
            out, f"{site.name}/{name}.safetensors", {"activations": activations}
        )
        rounding = torch.zeros(n_tokens, dtype=torch.float64)
        for batch in batches:
            rounding += batch.rounding[site.name]
        partial = partial_sums(activations, rounding=rounding)
        sums |= {f"{site.name}/{key}": value for key, value in partial.items()}
    images = [image for batch in batches for image in batch.images]
    record = ShardRecord(
        index=index,
        content_ids=tuple(image.content_id for image in images),
        refs=tuple(image.entry.ref for image in images),
        labels=tuple(image.entry.label for image in images),
        groups=tuple(image.entry.group for image in images),
        skipped=tuple(skipped),
        files=files,
        statistics=write_tensors(out, f"shards/{name}.safetensors", sums),
    )
    write_record(_shard_path(out, index), record)


def _finish(out: Path, plan: StoreRecord) -> None:
    """Write the list of skipped images and mark the store complete."""
    shards = [
        read_record(ShardRecord, _shard_path(out, index), error=StoreError)
        for index in range(plan.n_shards)
    ]
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
    write_record(out / "store.json", dataclasses.replace(plan, complete=True))


def _clear(out: Path, plan: StoreRecord) -> None:
    """Remove a store without images, so that nothing stands in the way of the next attempt."""
    with disk_errors(out):
        (out / "store.json").unlink()
        for name in ("shards", *(site.name for site in plan.sites)):
            shutil.rmtree(out / name)
