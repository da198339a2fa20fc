"""Build a feature index: the verb ``index``.

One pass encodes the store's tokens, shard by shard, into code files; two passes over those files
give the statistics and the examples. Finished code files are never made again: interrupt it at any
moment and run the same command, and it goes on with the first missing one, with an equal result.

Memory: one shard's activations and codes, 8 bytes × features × (patches + 2 × classes), and what
``visae.features.describe`` samples.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image

import visae
from visae.activations.source import RecordedImages
from visae.activations.store import ActivationStore
from visae.errors import FeatureIndexError
from visae.features.codes_files import read_codes, write_codes
from visae.features.config import IndexConfig
from visae.features.describe import describe
from visae.features.examples_file import example_rows, write_examples
from visae.features.index import FeatureIndex, find_damage
from visae.features.record import CodesShard, IndexRecord, codes_name
from visae.features.table import write_feature_table
from visae.features.thumbnails import thumbnail_path, write_thumbnails
from visae.images.catalog import ImageTable
from visae.images.source import ImageSource
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.codes import SparseCodes
from visae.saes.hub import FoundSAE, find_sae
from visae.saes.matching import require_match
from visae.saes.sae import SAE
from visae.storage.atomic import disk_errors, remove_leftovers
from visae.storage.differences import differences
from visae.storage.hashing import hash_file
from visae.storage.locks import exclusive
from visae.storage.portable import portable
from visae.storage.records import read_record, to_plain, write_record
from visae.storage.tensors import FileRef

__all__ = ["build_index"]

_NOT_COMPARED = ("visae_version", "sae", "store", "codes", "files", "complete")
_IMAGES = "images.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """What stays the same from step to step."""

    out: Path
    plan: IndexRecord
    store: ActivationStore
    images: ImageTable
    indexed: Bool[torch.Tensor, " image"]
    progress: ProgressCallback

    def report(self, stage: str, done: int, total: int, unit: str) -> None:
        self.progress(Progress(stage=stage, done=done, total=total, unit=unit))


def build_index(
    sae_folder: str | Path,
    store: ActivationStore,
    out: Path,
    *,
    config: IndexConfig,
    images: str | Path | ImageSource | None = None,
    kinds: Sequence[type[Any]] = (),
    device: str | torch.device = "cpu",
    progress: ProgressCallback = silent,
) -> FeatureIndex:
    """Write, or complete, in folder ``out`` the index of an SAE's features on a store's images.

    Args:
        sae_folder: Checkpoint of the SAE, here or on the model hub (``hf://…``); its own sparsity
            kinds, if any, are given in ``kinds``.
        store: Activations of the same model at the SAE's site; not necessarily those it learned
            from.
        out: Folder of the index.
        config: Which images to look at, and how many examples to keep.
        images: The pictures or where they are, if they moved since they were recorded.
        kinds: Sparsity kinds of your own, besides the built-in ones.
        device: Where to encode.
        progress: Told of every shard and thumbnail.

    Raises:
        CheckpointError: when the SAE cannot be loaded or was not made for this store.
        FeatureIndexError: when ``out`` holds another index (naming what differs), or no image is
            left to look at.
        StoreError: when the pictures are not where they were, ``out`` is being written by another
            process, or the disk is full.
    """
    out = Path(out)
    found_sae = find_sae(sae_folder)
    work = _prepare(found_sae, store, out, config, progress)
    with exclusive(out):
        found = _begin(out, work.plan)
        if found.complete and not _missing_parts(work, found):
            return FeatureIndex(out)
        source = _open_source(store, images)
        sae = load_sae(found_sae.folder, kinds=kinds, device=device)
        write_record(out / "index.json", work.plan)
        remove_leftovers(out)
        shards = _encode(work, sae)
        files = _describe(work, sae, shards)
        _write_thumbnails(work, source)
        done = dataclasses.replace(work.plan, codes=shards, files=files, complete=True)
        write_record(out / "index.json", done)
    return FeatureIndex(out)


def _prepare(
    found: FoundSAE,
    store: ActivationStore,
    out: Path,
    config: IndexConfig,
    progress: ProgressCallback,
) -> _Work:
    """Which images the index looks at, and what it will say of itself when finished."""
    indexed = _indexed_images(store, config)
    rows = indexed.nonzero().flatten().tolist()
    images = store.images.take(rows)
    sae = read_sae_record(found.folder)
    plan = IndexRecord(
        visae_version=visae.__version__,
        sae=found.portable(out),
        sae_name=found.name,
        sae_sha256=sae.weights.sha256,
        store=portable(store.folder, out),
        store_digest=store.digest,
        model=store.record.identity,
        site=require_match(sae, store),
        layout=sae.provenance.layout,
        tokens=sae.provenance.tokens,
        preprocessing=store.record.preprocessing,
        config=config,
        n_features=sae.n_features,
        n_images=len(images),
        n_shards=store.n_shards,
        classes=images.classes,
    )
    return _Work(out=out, plan=plan, store=store, images=images, indexed=indexed, progress=progress)


def _open_source(store: ActivationStore, images: str | Path | ImageSource | None) -> RecordedImages:
    if images is None or isinstance(images, str | Path):
        return store.source(images)
    return RecordedImages(store.images, images)


def _indexed_images(store: ActivationStore, config: IndexConfig) -> Bool[torch.Tensor, " image"]:
    """Whether each image of the store is looked at."""
    if config.side == "all":
        return torch.ones(store.n_images, dtype=torch.bool)
    sides = store.images.sides(confirmation_share=config.confirmation_share, salt=config.salt)
    indexed = torch.tensor([side == "discovery" for side in sides], dtype=torch.bool)
    if not indexed.any():
        raise FeatureIndexError(
            f"None of the {store.n_images} images is on the discovery side",
            where=store.folder,
            fix="Record more images, or give a smaller confirmation_share",
        )
    return indexed


def _begin(out: Path, plan: IndexRecord) -> IndexRecord:
    """The record that is there, if it is of the same index, else the plan."""
    path = out / "index.json"
    if not path.exists():
        _refuse_orphans(out)
        return plan
    found = read_record(IndexRecord, path, error=FeatureIndexError)
    different = differences(_recipe(found), _recipe(plan))
    if different:
        raise FeatureIndexError(
            f"This folder holds another index ({'; '.join(different)})",
            where=out,
            fix="Choose another --out, or delete the folder",
        )
    return found


def _refuse_orphans(out: Path) -> None:
    """Refuse codes without the record that says from which SAE they are."""
    if any((out / "codes").glob("*.safetensors")):
        raise FeatureIndexError(
            "This folder holds codes, but not the index.json that says from which SAE they are",
            where=out,
            fix="Choose another --out, or delete the folder",
        )


def _recipe(record: IndexRecord) -> dict[str, Any]:
    """What must be equal for an index to be gone on with."""
    return {name: v for name, v in to_plain(record).items() if name not in _NOT_COMPARED}


def _missing_parts(work: _Work, found: IndexRecord) -> bool:
    """Whether a file or thumbnail of a complete index is gone or cut short."""
    if find_damage(work.out, found):
        return True
    rows = example_rows(work.out / found.files["examples"].name)
    ids = {work.images.content_ids[row] for row in rows}
    return not all(thumbnail_path(work.out, content_id).is_file() for content_id in ids)


def _encode(work: _Work, sae: SAE) -> tuple[CodesShard, ...]:
    """Write the codes of every shard that is not there yet."""
    shards: list[CodesShard] = []
    first_image = 0
    for number in range(work.store.n_shards):
        shard = _reuse(work, number, first_image) or _encode_shard(work, sae, number, first_image)
        shards.append(shard)
        first_image += shard.n_images
        work.report("index", first_image, work.plan.n_images, "images")
    return tuple(shards)


def _reuse(work: _Work, number: int, first_image: int) -> CodesShard | None:
    """A code file of an earlier, interrupted run, if it is there and sound."""
    name = codes_name(number)
    path = work.out / name
    if not path.is_file():
        return None
    n_images = int(_indexed_of_shard(work, number).sum())
    n_tokens = n_images * work.plan.tokens_per_image
    try:
        codes = read_codes(path, n_tokens=n_tokens, n_features=work.plan.n_features)
    except FeatureIndexError:  # cut short: made anew
        return None
    file = FileRef(name=name, n_bytes=path.stat().st_size, sha256=hash_file(path))
    return _shard_of(codes, file, first_image, n_images)


def _encode_shard(work: _Work, sae: SAE, number: int, first_image: int) -> CodesShard:
    shard = work.store.shard(work.plan.site, number, work.plan.tokens)
    kept = shard.activations[_indexed_of_shard(work, number)]
    codes = sae.encode_sparse(kept.flatten(0, 1).to(sae.W_enc.device)).cpu()
    file = write_codes(work.out, codes_name(number), codes)
    return _shard_of(codes, file, first_image, kept.shape[0])


def _shard_of(codes: SparseCodes, file: FileRef, first_image: int, n_images: int) -> CodesShard:
    n_entries = codes.values.shape[0]
    return CodesShard(first_image=first_image, n_images=n_images, n_entries=n_entries, file=file)


def _indexed_of_shard(work: _Work, number: int) -> Bool[torch.Tensor, " image"]:
    first = sum(work.store.n_images_in_shard(i) for i in range(number))
    return work.indexed[first : first + work.store.n_images_in_shard(number)]


def _describe(work: _Work, sae: SAE, shards: tuple[CodesShard, ...]) -> dict[str, FileRef]:
    """Write the statistics, the examples and the table of images."""
    columns, bands = describe(
        work.out,
        dataclasses.replace(work.plan, codes=shards),
        work.images,
        sae.W_dec,
        progress=work.progress,
    )
    with disk_errors(work.out):
        work.images.write(work.out / _IMAGES)
    path = work.out / _IMAGES
    return {
        "features": write_feature_table(work.out, "features.parquet", columns),
        "examples": write_examples(work.out, "examples.safetensors", bands),
        "images": FileRef(name=_IMAGES, n_bytes=path.stat().st_size, sha256=hash_file(path)),
    }


def _write_thumbnails(work: _Work, source: RecordedImages) -> None:
    entry_of = {entry.ref: entry for entry in source.entries}
    rows = example_rows(work.out / "examples.safetensors")
    entries = [(entry_of[work.images.refs[row]], work.images.content_ids[row]) for row in rows]
    preprocessing, layout = work.plan.preprocessing, work.plan.layout

    def view(pixels: Image.Image) -> Image.Image:
        return layout.seen(preprocessing.view(pixels))

    for done in write_thumbnails(work.out, entries, source, view):
        work.report("thumbnails", done, len(entries), "images")
