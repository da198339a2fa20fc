"""Record a model's activations on images: the verb ``record``.

Shards are written one after another; a finished one is never touched again. Interrupt it at any
moment and run the same command: it goes on with the missing shards, with an equal result. Under
torchrun each rank writes some of the shards, and the result is the same again.

The way of an image: ``decoding`` reads it, the model runs here, ``shard_buffer`` keeps and writes
what the store keeps, ``completing`` gathers the shards.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visae.activations.completing import complete
from visae.activations.continuing import hash_of_images
from visae.activations.decoding import DecodedImage, Decoding, decoded_images, default_workers
from visae.activations.format import RecordConfig, StoreRecord
from visae.activations.planning import (
    begin,
    check_space,
    missing_shards,
    plan_store,
)
from visae.activations.shard_buffer import ShardBuffer
from visae.activations.shard_writing import Meter, ShardWriter
from visae.activations.store import ActivationStore
from visae.activations.summing import forget_sums, require_sums_of
from visae.distributed import Ranks
from visae.errors import ConfigError, ImageError, StoreError
from visae.images.source import ImageEntry, ImageSource, StreamedSource
from visae.models.config import ModelConfig
from visae.models.protocol import VisionModel
from visae.progress import ProgressCallback, silent
from visae.storage.atomic import remove_leftovers
from visae.storage.locks import exclusive

__all__ = ["record"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recording:
    """What stays the same from shard to shard."""

    source: ImageSource
    model: VisionModel
    out: Path
    plan: StoreRecord
    config: RecordConfig
    device: torch.device
    strict: bool
    ranks: Ranks


def record(
    source: ImageSource,
    model: VisionModel,
    out: Path,
    *,
    config: RecordConfig,
    model_config: ModelConfig,
    strict: bool = False,
    progress: ProgressCallback = silent,
    ranks: Ranks | None = None,
) -> ActivationStore:
    """Write, or complete, the activation store of ``source`` under ``model`` in folder ``out``.

    Images that cannot be read are left out and listed with the reason in ``skipped.csv``; with
    ``strict`` the first one raises instead. Of several ``ranks``, each calls this with the same
    arguments; they share the work, and the folder.

    Raises:
        StoreError: when ``out`` holds another recording (naming what differs), is being written
            by another process, or the disk cannot hold the store.
        ModelError: when the model gives NaN or infinite activations (naming image and site).
        ImageError: when there is no image, or none can be read; nothing stays but the list of
            skipped images, so that the same command starts anew once they are mended. With
            ``strict``, also when shards recorded without it lack images.
    """
    out, ranks = Path(out), ranks or Ranks()
    if not source.entries:
        raise ImageError("There are no images", where=source.location, fix="Give other --images")
    plan = plan_store(source, model, out, config=config, model_config=model_config)
    recording = _Recording(
        source=source,
        model=model,
        out=out,
        plan=plan,
        config=config,
        device=_device(model, plan),
        strict=strict,
        ranks=ranks,
    )
    with _only_writer(recording):
        missing = ranks.first(lambda: _shards_to_write(recording))
        _require_same_plan(recording)
        if missing is not None:
            meter = Meter(plan, missing, ranks, progress)
            mine = missing[ranks.rank :: ranks.world_size]
            ranks.together(lambda: _write_shards(recording, mine, meter))
            ranks.first(lambda: complete(out, plan, batch_size=config.batch_size))
    store = ActivationStore(out)
    if strict:
        _require_all_images(store)
    return store


def _require_all_images(store: ActivationStore) -> None:
    """Refuse a store of which an earlier run left images out."""
    n_listed = store.record.n_images_in_source
    if n_skipped := n_listed - store.n_images:
        raise ImageError(
            f"{n_skipped} of {n_listed} images were left out when recorded without --strict",
            where=store.folder / "skipped.csv",
            fix="Mend them and choose another --out, or leave --strict out",
        )


def _device(model: VisionModel, plan: StoreRecord) -> torch.device:
    """Where the model is: where it gives its activations of a blank image."""
    blank = torch.zeros(1, 3, *plan.preprocessing.size)
    site = plan.sites[0].name
    return model.tokens(blank, [site])[site].device


@contextlib.contextmanager
def _only_writer(recording: _Recording) -> Iterator[None]:
    """Hold the lock of the store's folder, on the first rank for all of them."""
    with contextlib.ExitStack() as stack:
        recording.ranks.first(lambda: stack.enter_context(exclusive(recording.out)))
        yield


def _shards_to_write(recording: _Recording) -> list[int] | None:
    """Begin or go on: the shards that are missing, None when the store is complete."""
    out, plan = recording.out, recording.plan
    remove_leftovers(out)
    if not begin(out, plan, recording.source):
        forget_sums(out, plan)
        return None
    missing = missing_shards(out, plan)
    require_sums_of(out, missing)
    check_space(out, plan, missing)
    return missing


def _require_same_plan(recording: _Recording) -> None:
    """Refuse ranks that see other images, another model or another folder than the first."""
    ranks = recording.ranks
    images = hash_of_images(recording.source.entries) if ranks.world_size > 1 else ""
    sees_store = (recording.out / "store.json").is_file()
    plans = ranks.gather(((recording.plan, images), sees_store))
    for rank, (plan, sees_store) in enumerate(plans):
        if plan != plans[0][0] or not sees_store:
            raise StoreError(
                f"Rank {rank} does not record the same: another model or other images, or it does "
                "not see the folder",
                where=recording.out,
                fix="Give every rank the same weights and images, and an --out that all share",
            )


def _write_shards(recording: _Recording, shards: Sequence[int], meter: Meter) -> None:
    """Read, run and write some shards, one after another."""
    plan, entries = recording.plan, recording.source.entries
    per_shard = plan.images_per_shard
    parts = [entries[i * per_shard : (i + 1) * per_shard] for i in shards]
    decoding = _decoding(recording)
    with (
        _current(recording.device),
        ShardWriter(recording.out, plan, meter, adds_up=recording.ranks.is_first) as writer,
        decoded_images(decoding, [entry for part in parts for entry in part]) as images,
    ):
        for index, part in zip(shards, parts, strict=True):
            shard = ShardBuffer(plan, index, device=recording.device)
            for batch in _batches(recording, images, part, shard.skipped):
                shard.add(batch, _tokens(recording, batch))
                meter.add_images(len(batch))
            meter.add_images(len(shard.skipped))
            writer.write(shard)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the one that streams and events belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _decoding(recording: _Recording) -> Decoding:
    plan = recording.plan
    layouts = {site.layout.grid: site.layout for site in plan.sites}
    return Decoding(
        source=recording.source,
        preprocessing=plan.preprocessing,
        layouts=tuple(layouts.values()) if plan.mask_classes is not None else (),
        workers=_n_workers(recording),
        n_ahead=2 * recording.config.batch_size,
    )


def _n_workers(recording: _Recording) -> int:
    """As many as asked for, or as the device needs; a stream is read by this process."""
    source, wanted = recording.source, recording.config.workers
    is_stream = isinstance(source, StreamedSource) and source.is_stream
    if is_stream and wanted:
        raise ConfigError(
            "A stream of images is read by one process",
            where=f"--workers {wanted}",
            fix="Use --workers 0",
        )
    if wanted is not None or is_stream:
        return wanted or 0
    on_gpu = recording.device.type != "cpu"
    return default_workers(on_gpu=on_gpu, n_processes=recording.ranks.n_local)


def _batches(
    recording: _Recording,
    images: Iterator[DecodedImage | ImageError],
    entries: Sequence[ImageEntry],
    skipped: list[tuple[str, str]],
) -> Iterator[list[DecodedImage]]:
    """A shard's readable images in full batches; what cannot be read is added to ``skipped``."""
    batch: list[DecodedImage] = []
    for entry in entries:
        image = next(images)
        if isinstance(image, DecodedImage):
            batch.append(image)
        elif recording.strict:
            raise image
        else:
            skipped.append((entry.ref, image.what))
        if len(batch) == recording.config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _tokens(recording: _Recording, batch: Sequence[DecodedImage]) -> Mapping[str, Tensor]:
    """Run the model on a batch, as far as the last site."""
    plan, device = recording.plan, recording.device
    views = torch.from_numpy(np.stack([image.view for image in batch]))
    if device.type == "cuda":
        views = views.pin_memory().to(device, non_blocking=True)
    pixels = plan.preprocessing.normalise(views)
    with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
        return recording.model.tokens(pixels, [site.name for site in plan.sites])
