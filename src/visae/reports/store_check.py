"""The doctor's look at an activation store: every file, every number, and what would mend it.

An incomplete store is looked at as far as it goes. Whatever is missing or damaged, the last line
is the command that makes it whole: ``visae record`` as reconstructed from ``store.json``, after
``rm`` of the damaged files where there are any.
"""

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.completing import digest_of
from visae.activations.format import (
    ShardFiles,
    ShardTable,
    SiteRecord,
    StoreContents,
    StoreRecord,
    grid_name,
    shard_name,
)
from visae.activations.planning import missing_shards, read_shard_record, shard_path
from visae.activations.resuming import record_command
from visae.activations.statistics import SiteStatistics, token_kinds
from visae.activations.store import ActivationStore
from visae.errors import StoreError, VisaeError
from visae.reports.finding import Finding
from visae.storage.atomic import leftovers
from visae.storage.locks import is_locked
from visae.storage.records import read_record
from visae.storage.tensors import read_tensors, verify_file

__all__ = ["check_store"]

_MOST_LISTED = 10
_CLOSE = 1e-4  # relative; sums in another order, and float32 products of centred activations
_IMAGES_AT_ONCE = 64


def check_store(folder: Path) -> Finding:
    """What is in a store, or everything that is wrong with it and the command that mends it.

    Cost: every file is read twice (checksums, then numbers).
    """
    try:
        record = read_record(StoreRecord, folder / "store.json", error=StoreError)
    except StoreError as error:
        return Finding(what=str(folder), is_fine=False, detail=str(error))
    if is_locked(folder):
        n_written = record.n_shards - len(missing_shards(folder, record))
        detail = f"being written now: {n_written} of {record.n_shards} shards so far"
        return Finding(what=str(folder), is_fine=True, detail=detail)
    problems = list(_Check(folder, record).problems())
    if not problems:
        return Finding(what=str(folder), is_fine=True, detail=_summary(folder))
    wrong = [each.text for each in problems]
    if len(wrong) > _MOST_LISTED:
        wrong[_MOST_LISTED:] = [f"and {len(wrong) - _MOST_LISTED} more like these"]
    damaged = [each.damaged for each in problems if each.damaged is not None]
    lines = [*wrong, f"to mend it, run: {_remedy(record, folder, damaged)}"]
    return Finding(what=str(folder), is_fine=False, detail="\n     ".join(lines))


def _remedy(record: StoreRecord, folder: Path, damaged: list[Path]) -> str:
    """The command that makes a store whole: recording skips whatever seems finished."""
    command = record_command(record, folder)
    if not damaged:
        return command
    paths = dict.fromkeys(str(path.resolve()) for path in damaged)
    return f"{shlex.join(['rm', '-f', *paths])} && {command}"


class _Problem(NamedTuple):
    """What is wrong, one sentence, and the file to delete so that recording makes it anew."""

    text: str
    damaged: Path | None = None


@final
@dataclasses.dataclass(frozen=True)
class _Check:
    """A store under examination."""

    folder: Path
    record: StoreRecord

    def problems(self) -> Iterator[_Problem]:
        """What is wrong, one by one."""
        missing = missing_shards(self.folder, self.record)
        if missing:
            n = self.record.n_shards
            yield _Problem(
                f"incomplete: {len(missing)} of {n} shards are missing ({_ranges(missing)})"
            )
        elif self.record.contents is None:
            yield _Problem("incomplete: every shard is written, but they are not gathered yet")
        yield from self._strangers()
        is_whole = self.record.contents is not None and not missing
        totals: dict[str, SiteStatistics] | None = {} if is_whole else None
        for index in sorted(set(range(self.record.n_shards)) - set(missing)):
            for problem in self._shard_problems(index, totals):
                is_whole = False
                yield problem
        if self.record.contents is not None:
            yield from self._gathered_problems(self.record.contents, totals if is_whole else None)

    def _strangers(self) -> Iterator[_Problem]:
        """Files that a killed process left, and shards beyond the last one."""
        if found := leftovers(self.folder):
            n_bytes = sum(path.stat().st_size for path in found if path.is_file())
            files = "1 temporary file" if len(found) == 1 else f"{len(found)} temporary files"
            yield _Problem(
                f"{files} of a killed process ({n_bytes / 1e6:.1f} MB): recording again clears them"
            )
        known = {shard_name(index) for index in range(self.record.n_shards)}
        for name in ("shards", "labels", *(site.name for site in self.record.sites)):
            foreign = {p.stem for p in (self.folder / name).glob("[!.]*")} - known
            if foreign:
                strangers = ", ".join(sorted(foreign))
                yield _Problem(f"{name} holds files of no shard of this store: {strangers}")

    def _shard_problems(
        self, index: int, totals: dict[str, SiteStatistics] | None
    ) -> Iterator[_Problem]:
        """What is wrong with a shard; its statistics are added to ``totals``, if any."""
        damaged = shard_path(self.folder, index)
        remedy = f"delete {damaged} and record again, which resumes"
        try:
            shard = read_shard_record(self.folder, self.record, index)
            labels = [] if shard.patch_labels is None else [shard.patch_labels]
            for ref in (*shard.files.values(), *labels):
                verify_file(self.folder, ref)
            if shard.patch_labels is not None:
                self._check_labels(self.folder / shard.patch_labels.name, len(shard.content_ids))
            for site in self.record.sites:
                path = self.folder / shard.files[site.name].name
                found = self._checked(site, path, shard.refs)
                if totals is not None:
                    self._add_up(site, found, totals)
        except VisaeError as error:
            place = f" ({error.where})" if error.where else ""
            yield _Problem(f"{error.what}{place}: {remedy}", damaged)

    def _checked(
        self, site: SiteRecord, path: Path, refs: tuple[str, ...]
    ) -> Float[Tensor, "image token d_model"]:
        """A shard's activations at one site, if they are what they should be."""
        found = read_tensors(path).get("activations")
        expected = (len(refs), site.layout.n_kept(self.record.tokens), site.d_model)
        dtype = getattr(torch, self.record.dtype)
        if found is None or tuple(found.shape) != expected or found.dtype != dtype:
            shown = "no activations" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise StoreError(f"A shard holds {shown} instead of {expected} of {dtype}", where=path)
        finite = torch.isfinite(found).flatten(1).all(dim=1)
        if not finite.all():
            bad = refs[int((~finite).nonzero()[0])]
            raise StoreError(f"NaN or infinite activations at {site.name}, image {bad}", where=path)
        return found

    def _add_up(
        self,
        site: SiteRecord,
        activations: Float[Tensor, "image token d_model"],
        totals: dict[str, SiteStatistics],
    ) -> None:
        """Add a shard's activations to the statistics."""
        for kind, at in token_kinds(site.layout, self.record.tokens).items():
            key = f"{site.name}/{kind}"
            for start in range(0, len(activations), _IMAGES_AT_ONCE):
                more = SiteStatistics.of(activations[start : start + _IMAGES_AT_ONCE, at])
                totals[key] = totals[key].plus(more) if key in totals else more

    def _check_labels(self, path: Path, n_images: int) -> None:
        """A shard's patch labels have the right shapes and known classes."""
        tensors = read_tensors(path)
        known = {each.value for each in self.record.mask_classes or ()}
        for rows, columns in {site.layout.grid for site in self.record.sites}:
            grid = grid_name((rows, columns))
            labels, purity = (tensors.get(f"{grid}/{name}") for name in ("label", "purity"))
            expected = (n_images, rows * columns)
            shapes = [None if each is None else tuple(each.shape) for each in (labels, purity)]
            if labels is None or purity is None or shapes != [expected, expected]:
                raise StoreError(
                    f"Patch labels and purities of {grid} have shapes {shapes} instead of two "
                    f"of {expected}",
                    where=path,
                )
            strange = sorted(set(labels.flatten().tolist()) - known - {-1}) if known else []
            if strange:
                raise StoreError(
                    f"Patch labels of {grid} hold unknown classes {strange}", where=path
                )

    def _gathered_problems(
        self, contents: StoreContents, totals: dict[str, SiteStatistics] | None
    ) -> Iterator[_Problem]:
        """What is wrong with the files that were gathered from the shards."""
        whole = True
        for ref in (contents.images, contents.statistics, contents.shards):
            try:
                verify_file(self.folder, ref)
            except StoreError as error:
                whole = False
                path = self.folder / ref.name
                remedy = "delete it and record again, which gathers it anew"
                yield _Problem(f"{error.what} ({path}): {remedy}", path)
        if not whole or totals is None:
            return
        table = read_record(ShardTable, self.folder / contents.shards.name, error=StoreError)
        yield from self._table_problems(contents, table.shards)
        yield from self._statistics_problems(totals)

    def _table_problems(
        self, contents: StoreContents, shards: tuple[ShardFiles, ...]
    ) -> Iterator[_Problem]:
        """Whether the list of shards, the table of images and the digest agree with the shards."""
        gathered = self.folder / contents.shards.name
        remedy = f"delete {gathered} and record again, which gathers them anew"
        for index, shard in enumerate(shards):
            path = self.folder / shard.record.name
            try:
                verify_file(self.folder, shard.record)
            except StoreError as error:
                again = f"delete {path} and record again, which makes it anew"
                yield _Problem(f"{error.what} ({path}): {again}", path)
                return
            recorded = read_shard_record(self.folder, self.record, index)
            if recorded.files != shard.files or len(recorded.content_ids) != shard.n_images:
                yield _Problem(
                    f"shard {index} is not the one that was gathered: {remedy}", gathered
                )
        images = ActivationStore(self.folder).images
        if len(images) != contents.n_images or contents.digest != digest_of(
            images.content_ids, shards
        ):
            yield _Problem(
                f"the digest is not that of the images and activations: {remedy}", gathered
            )

    def _statistics_problems(self, totals: dict[str, SiteStatistics]) -> Iterator[_Problem]:
        """Stored statistics beside those of the activations as they are on disk."""
        path = self.folder / "statistics.safetensors"
        tensors = read_tensors(path)
        for key, found in totals.items():
            for name, value in found.tensors().items():
                stored = tensors.get(f"{key}/{name}")
                if name != "rounding_square_sum" and not _close(name, stored, value):
                    yield _Problem(
                        f"the stored statistics of {key} are not those of its activations "
                        f"({name}): delete {path} and record again, which takes them anew",
                        path,
                    )
                    break


def _close(name: str, stored: Tensor | None, found: Tensor) -> bool:
    """Whether two statistics are equal but for the order of sums (and norms between two bins)."""
    if stored is None or stored.shape != found.shape:
        return False
    difference = (stored.double() - found.double()).abs()
    if name == "norm_histogram":
        return bool(difference.sum() <= 2 + _CLOSE * found.sum())
    return bool(difference.norm() <= _CLOSE * found.double().norm())


def _summary(folder: Path) -> str:
    """What is in a healthy store."""
    store = ActivationStore(folder)
    found = {site: store.statistics(site) for site in store.sites}
    sites = [
        f"{site} (‖x‖ median {each.norm_quantile(0.5):.3g}, "
        f"{len(each.outlier_dimensions)} outlier dimensions, "
        f"rounding error {each.rounding_error:.2g} of the spread)"
        for site, each in found.items()
    ]
    said = f"store of {store.n_images:,} images, every checksum right; {'; '.join(sites)}"
    if store.record.mask_classes is None:
        return said
    labels = store.patch_labels(store.sites[0])
    share = float((labels.labels >= 0).double().mean())
    return f"{said}; {len(labels.classes)} patch classes on {share:.0%} of the patches"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, runs shortened: 0, 3-7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(shown[:8]) + "…" * (len(shown) > 8)
