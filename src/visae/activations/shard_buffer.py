"""One shard in memory: filled batch by batch while the model runs, then written as files.

Activations go straight from the model's device into memory laid out as the shard's file, and their
statistics are taken on that device, so that a GPU never waits for the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visae.activations.decoding import DecodedImage
from visae.activations.format import (
    ShardRecord,
    SiteRecord,
    StoreRecord,
    grid_name,
    shard_name,
)
from visae.activations.planning import recording_id, shard_path
from visae.activations.statistics import SiteStatistics, token_kinds
from visae.activations.summing import statistics_tensors
from visae.errors import ModelError
from visae.images.catalog import ImageTable
from visae.storage.records import write_record
from visae.storage.tensors import FileRef, write_tensors

__all__ = ["ShardBuffer"]

_NO_VIEW = np.empty((0, 0, 3), dtype=np.uint8)
_LABEL_OF_NOTHING, _PURITY_OF_NOTHING = -1, 0.0  # of a patch without a mask


@final
class ShardBuffer:
    """The images of one shard and their activations.

    Args:
        plan: The store's.
        index: Which shard.
        device: Where the model's activations come from.
    """

    def __init__(self, plan: StoreRecord, index: int, *, device: torch.device) -> None:
        self._plan, self._index, self._device = plan, index, device
        self._images: list[DecodedImage] = []
        self._activations = {site.name: self._memory(site) for site in plan.sites}
        self._finite = torch.ones(
            (len(plan.sites), plan.n_listed(index)),
            dtype=torch.bool,
            pin_memory=device.type == "cuda",
        )
        self._statistics: dict[str, SiteStatistics] = {}
        self._n_checked = 0
        self._copied = _event() if device.type == "cuda" else None
        self.skipped: list[tuple[str, str]] = []

    @torch.no_grad()
    def add(self, images: Sequence[DecodedImage], tokens: Mapping[str, Tensor]) -> None:
        """Keep a batch: what the store keeps of the tokens of each site.

        Raises:
            ModelError: when the batch before this one had NaN or infinite activations.
        """
        first = len(self._images)
        rows = slice(first, first + len(images))
        for site, finite in zip(self._plan.sites, self._finite, strict=True):
            self._add_site(site, rows, tokens[site.name], finite)
        self._require_finite()
        self._images += [image._replace(view=_NO_VIEW) for image in images]
        if self._copied is not None:
            self._copied.record()

    def write(self, out: Path) -> int:
        """Write the tensors, then the JSON: the shard exists from then on. Gives its bytes.

        Raises:
            ModelError: when the last batch had NaN or infinite activations.
            StoreError: when the disk is full or not permitted.
        """
        self._require_finite()
        name = shard_name(self._index)
        files = {
            site.name: self._write_site(out, f"{site.name}/{name}.safetensors", site)
            for site in self._plan.sites
        }
        labels = self._write_patch_labels(out, f"labels/{name}.safetensors")
        sums = self._sums()
        tensors = statistics_tensors(sums)
        statistics = write_tensors(out, f"shards/{name}.safetensors", tensors)
        record = self._record(files, labels, statistics, sums)
        write_record(shard_path(out, self._index), record)
        return sum(file.n_bytes for file in files.values())

    def _memory(self, site: SiteRecord) -> Tensor:
        n_images, n_tokens = self._plan.n_listed(self._index), site.layout.n_kept(self._plan.tokens)
        return torch.empty(
            (n_images, n_tokens, site.d_model),
            dtype=getattr(torch, self._plan.dtype),
            pin_memory=self._device.type == "cuda",
        )

    def _add_site(
        self,
        site: SiteRecord,
        rows: slice,
        tokens: Float[Tensor, "image token d_model"],
        finite: Bool[Tensor, " listed"],
    ) -> None:
        computed = tokens[:, site.layout.kept(self._plan.tokens)]
        memory = self._activations[site.name]
        stored = computed.to(memory.dtype)
        memory[rows].copy_(stored, non_blocking=True)
        difference = stored.float() - computed.float()  # NaN or infinite where either is
        lengths = torch.linalg.vector_norm(difference, dim=2, dtype=torch.float64)
        finite[rows].copy_(torch.isfinite(lengths).all(1), non_blocking=True)
        rounding = lengths.square_().sum(0)
        for kind, at in token_kinds(site.layout, self._plan.tokens).items():
            batch = SiteStatistics.of(stored[:, at], rounding=rounding[at])
            key = f"{site.name}/{kind}"
            before = self._statistics.get(key)
            self._statistics[key] = batch if before is None else before.plus(batch)

    def _require_finite(self) -> None:
        """Look at the images added before, once their activations have come from the device."""
        if self._copied is not None:
            self._copied.synchronize()
        unchecked = slice(self._n_checked, len(self._images))
        for site, finite in zip(self._plan.sites, self._finite[:, unchecked], strict=True):
            if not finite.all():
                bad = self._images[self._n_checked + int((~finite).nonzero()[0])]
                raise ModelError(
                    f"The model gives NaN or infinite activations at {site.name} for image "
                    f"{bad.entry.ref}",
                    where=self._plan.identity.name,
                    fix="Look at that image and the weights; where float16 overflows, try --dtype "
                    "bfloat16 and --precision float32",
                )
        self._n_checked = len(self._images)

    def _write_site(self, out: Path, name: str, site: SiteRecord) -> FileRef:
        activations = self._activations[site.name][: len(self._images)]
        return write_tensors(out, name, {"activations": activations})

    def _write_patch_labels(self, out: Path, name: str) -> FileRef | None:
        if self._plan.mask_classes is None:
            return None
        tensors: dict[str, Tensor] = {}
        for grid in {site.layout.grid for site in self._plan.sites}:
            shape = len(self._images), grid[0] * grid[1]
            label = torch.full(shape, _LABEL_OF_NOTHING, dtype=torch.int32)
            purity = torch.full(shape, _PURITY_OF_NOTHING, dtype=torch.float32)
            for row, image in enumerate(self._images):
                if grid in image.patch_labels:
                    label[row] = torch.from_numpy(image.patch_labels[grid].label)
                    purity[row] = torch.from_numpy(image.patch_labels[grid].purity)
            tensors |= {f"{grid_name(grid)}/label": label, f"{grid_name(grid)}/purity": purity}
        return write_tensors(out, name, tensors)

    def _sums(self) -> dict[str, SiteStatistics]:
        """The statistics of the shard; those of nothing where no image could be read."""
        found = dict(self._statistics)
        for site in self._plan.sites:
            empty = self._activations[site.name][:0]
            for kind, at in token_kinds(site.layout, self._plan.tokens).items():
                found.setdefault(f"{site.name}/{kind}", SiteStatistics.of(empty[:, at]))
        return found

    def _record(
        self,
        files: dict[str, FileRef],
        labels: FileRef | None,
        statistics: FileRef,
        sums: Mapping[str, SiteStatistics],
    ) -> ShardRecord:
        table = ImageTable.of((i.entry, i.content_id, i.mask_id) for i in self._images)
        kinds = {s.name: token_kinds(s.layout, self._plan.tokens) for s in self._plan.sites}
        return ShardRecord(
            recording=recording_id(self._plan),
            index=self._index,
            content_ids=table.content_ids,
            refs=table.refs,
            labels=table.labels,
            groups=table.groups,
            mask_ids=table.mask_ids,
            metadata=dict(table.metadata),
            skipped=tuple(self.skipped),
            files=files,
            patch_labels=labels,
            statistics=statistics,
            rounding={
                site: tuple(
                    value
                    for kind in found
                    for value in sums[f"{site}/{kind}"].rounding_square_sum.tolist()
                )
                for site, found in kinds.items()
            },
        )


def _event() -> torch.cuda.Event:
    new: Callable[[], torch.cuda.Event] = torch.cuda.Event
    return new()
