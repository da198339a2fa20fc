"""Reading an activation store: what it holds, one shard at a time, checked when asked."""

import bisect
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from visae.activations.completing import digest_of
from visae.activations.format import (
    DType,
    ShardFiles,
    ShardTable,
    SiteRecord,
    StoreContents,
    StoreRecord,
    grid_name,
    shard_name,
)
from visae.activations.planning import missing_shards
from visae.activations.resuming import recorded_location
from visae.activations.source import RecordedImages
from visae.activations.statistics import SiteStatistics, token_kinds
from visae.activations.token_files import TokenFile, tensor_file
from visae.errors import ImageError, StoreError, nearest_names
from visae.images.catalog import ImageTable
from visae.images.opening import open_images
from visae.models.config import ModelConfig, ModelIdentity
from visae.models.layout import TokenPolicy
from visae.models.names import resolve_model
from visae.models.preprocessing import Preprocessing
from visae.storage.portable import resolve_portable
from visae.storage.records import read_record
from visae.storage.tensors import read_tensors, verify_file

__all__ = ["ActivationStore", "PatchLabels", "Shard"]

_FIX = "It was altered or cut short: delete its shards/*.json and record again; that resumes"


class Shard(NamedTuple):
    """Activations of whole images, in recording order."""

    first_image: int
    """Row of its first image in the store."""
    activations: Float[Tensor, "image token d_model"]
    """In the store's number format."""


class PatchLabels(NamedTuple):
    """What each patch of a grid shows, by the images' masks."""

    classes: Mapping[int, str]
    """Name of each class value."""
    labels: Int32[Tensor, "image patch"]
    """Class value of each patch, row by row; −1 where most of it is ignored or has no mask."""
    purity: Float32[Tensor, "image patch"]
    """Share of the patch's pixels that are of it; 0 without a mask."""


class ActivationStore:
    """A complete activation store, opened for reading.

    Raises:
        StoreError: when there is no store, it is incomplete (saying what is missing), or one of
            its files is missing, cut short or altered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            raise StoreError(
                "There is no activation store here",
                where=folder,
                fix="Make one with: visae record --images SRC --model NAME --out DIR",
            )
        self.record = read_record(StoreRecord, self.folder / "store.json", error=StoreError)
        self._contents = self._complete_contents()
        self._shards = self._read_shards()
        self._first_images = [0, *itertools.accumulate(s.n_images for s in self._shards)]

    @property
    def model(self) -> ModelConfig:
        """How to load the model again."""
        weights = self.record.weights
        return ModelConfig(
            model=resolve_model(self.record.model, self.folder),
            weights=None if weights is None else resolve_portable(weights, self.folder),
            revision=self.record.identity.revision or self.record.revision,
            image_size=self.record.image_size,
            title=self.record.identity.title,
        )

    @property
    def identity(self) -> ModelIdentity:
        """Which model it was, by content."""
        return self.record.identity

    @property
    def preprocessing(self) -> Preprocessing:
        """How images became its input."""
        return self.record.preprocessing

    @property
    def dtype(self) -> DType:
        """Number format of the stored activations."""
        return self.record.dtype

    @property
    def tokens(self) -> TokenPolicy:
        """Which tokens of each image were kept."""
        return self.record.tokens

    @property
    def n_images(self) -> int:
        """Images in the store (skipped ones excluded)."""
        return self._contents.n_images

    @property
    def sites(self) -> list[str]:
        """The recorded sites."""
        return [site.name for site in self.record.sites]

    def n_tokens(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Tokens recorded at a site, all or those of a policy."""
        return self.n_images * self.tokens_per_image(site, tokens)

    def tokens_per_image(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Kept tokens of one image at a site, all or those of a policy."""
        return self.site(site).layout.n_kept(tokens or self.record.tokens)

    def positions(self, site: str, tokens: TokenPolicy | None = None) -> slice:
        """Where a policy's tokens are among the stored ones.

        Raises:
            ModelError: when they were not recorded.
        """
        stored = self.record.tokens
        return self.site(site).layout.within(tokens or stored, stored)

    @functools.cached_property
    def images(self) -> ImageTable:
        """Content ids, references, labels, groups and metadata of the images, in row order.

        Raises:
            StoreError: when the table is missing or altered.
        """
        verify_file(self.folder, self._contents.images)
        return ImageTable.read(self.folder / self._contents.images.name)

    def source(self, location: str | Path | None = None) -> RecordedImages:
        """The pictures, row by row in the store's order; each is checked as it is loaded.

        ``location`` says where the images are, for when they have moved since they were recorded.

        Raises:
            StoreError: when there are no such images any more, or others in their place.
        """
        found = recorded_location(self.record, self.folder) if location is None else str(location)
        try:
            source = open_images(found)
        except ImageError as failure:
            raise StoreError(
                f"The recorded images cannot be opened: {failure.what}",
                where=failure.where or found,
                fix="Give the location of the recorded images with --images",
            ) from failure
        return RecordedImages(self.images, source)

    @property
    def digest(self) -> str:
        """Hash of the images and activations: equal for equal recordings, wherever they are."""
        return self._contents.digest

    def site(self, name: str) -> SiteRecord:
        """The record of a site.

        Raises:
            StoreError: when the site was not recorded (naming those that were).
        """
        for site in self.record.sites:
            if site.name == name:
                return site
        raise StoreError(
            f"This store has no site {name}",
            where=self.folder,
            fix=f"Use one of its sites: {nearest_names(name, self.sites)}",
        )

    def only_site(self) -> str:
        """The store's site, when it has just one.

        Raises:
            StoreError: when there are several, and so one must be named.
        """
        if len(self.sites) != 1:
            raise StoreError(
                "This store has several sites",
                where=self.folder,
                fix=f"Name one with --site: {', '.join(self.sites)}",
            )
        return self.sites[0]

    def statistics(self, site: str, tokens: TokenPolicy | None = None) -> SiteStatistics:
        """Mean, scale, covariance, norms and outlier dimensions, over all tokens or a policy's.

        Raises:
            ModelError: when these tokens were not recorded.
            StoreError: when the statistics are missing or altered.
        """
        self.positions(site, tokens)
        kinds = token_kinds(self.site(site).layout, tokens or self.record.tokens)
        parts = [SiteStatistics.of_tensors(self._statistics, f"{site}/{kind}/") for kind in kinds]
        return functools.reduce(SiteStatistics.beside, parts)

    def patch_labels(self, site: str) -> PatchLabels:
        """The class of every patch of a site's grid, by the images' masks.

        Raises:
            StoreError: when the images had no masks, or a file is missing or altered.
        """
        if self.record.mask_classes is None:
            raise StoreError(
                "This store has no patch labels: its images had no masks",
                where=self.folder,
                fix="Record images with masks",
            )
        name = grid_name(self.site(site).layout.grid)
        parts = [self._patch_labels_of(index) for index in range(self.n_shards)]
        labels = torch.cat([part[f"{name}/label"] for part in parts])
        purity = torch.cat([part[f"{name}/purity"] for part in parts])
        named = {each.value: each.name for each in self.record.mask_classes}
        found = {value: str(value) for value in torch.unique(labels).tolist() if value >= 0}
        return PatchLabels(named or found, labels, purity)

    def n_images_in_shard(self, index: int) -> int:
        """Images in one shard."""
        return self._shards[index].n_images

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def shard(self, site: str, index: int, tokens: TokenPolicy | None = None) -> Shard:
        """One shard of a site, read whole: all its tokens, or those of a policy.

        Raises:
            StoreError: when its file is missing, cut short or has another shape.
        """
        expected = self._expected_shape(site, index)
        path = self.folder / site / f"{shard_name(index)}.safetensors"
        activations = read_tensors(path).get("activations")
        if activations is None or tuple(activations.shape) != expected:
            found = "no activations" if activations is None else tuple(activations.shape)
            raise StoreError(
                f"This shard holds {found} instead of {expected}", where=path, fix=_FIX
            )
        kept = activations[:, self.positions(site, tokens)]
        return Shard(first_image=self._first_images[index], activations=kept)

    def shards(self, site: str, tokens: TokenPolicy | None = None) -> Iterator[Shard]:
        """Every shard of a site, in order: all its tokens, or those of a policy."""
        for index in range(self.n_shards):
            yield self.shard(site, index, tokens)

    def rows(
        self, site: str, shard: int, images: slice, tokens: TokenPolicy | None = None
    ) -> Float[Tensor, "image token d_model"]:
        """Some images of a shard, read without the rest of the file."""
        positions = self.positions(site, tokens)
        from safetensors import SafetensorError, safe_open

        path = self.folder / site / f"{shard_name(shard)}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                rows: Tensor = file.get_slice("activations")[images, positions]
        except (OSError, SafetensorError) as failure:
            raise StoreError(
                f"This is not a whole shard: {failure}", where=path, fix=_FIX
            ) from failure
        wanted = len(range(*images.indices(self.n_images_in_shard(shard))))
        if rows.shape[0] != wanted:
            what = f"This shard holds {rows.shape[0]} of {wanted} images asked for"
            raise StoreError(what, where=path, fix=_FIX)
        return rows

    def image(
        self, site: str, row: int, tokens: TokenPolicy | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The tokens of one image of the store.

        Raises:
            StoreError: when there is no such row.
        """
        if not 0 <= row < self.n_images:
            fix = f"Give a row below {self.n_images}"
            raise StoreError("There is no such image", where=self.folder, fix=fix)
        shard = bisect.bisect_right(self._first_images, row) - 1
        row -= self._first_images[shard]
        return self.rows(site, shard, slice(row, row + 1), tokens)[0]

    def token_files(self, site: str) -> list[TokenFile]:
        """The files of a site in order, for readers that know their way around in them.

        Raises:
            StoreError: when one is missing, cut short or has another shape.
        """
        return [
            tensor_file(
                self.folder / site / f"{shard_name(index)}.safetensors",
                "activations",
                self._expected_shape(site, index),
                self.dtype,
            )
            for index in range(self.n_shards)
        ]

    def verify(self) -> None:
        """Compare every file with its recorded size and checksum, and look for non-finite values.

        Raises:
            StoreError: naming the first file that differs and what to do.
        """
        for ref in (self._contents.images, self._contents.statistics, self._contents.shards):
            verify_file(self.folder, ref)
        for index, shard in enumerate(self._shards):
            labels = [] if shard.patch_labels is None else [shard.patch_labels]
            for ref in (shard.record, *shard.files.values(), *labels):
                verify_file(self.folder, ref)
            for site in self.sites:
                if not torch.isfinite(self.shard(site, index).activations).all():
                    raise StoreError(
                        "A shard holds NaN or infinite activations",
                        where=self.folder / shard.files[site].name,
                        fix="Record again with --dtype float32",
                    )
        if digest_of(self.images.content_ids, self._shards) != self.digest:
            raise StoreError(
                "The store's digest is not that of its files", where=self.folder, fix=_FIX
            )

    def _complete_contents(self) -> StoreContents:
        """What the store holds, if none of its shards is missing."""
        missing = missing_shards(self.folder, self.record)
        if self.record.contents is not None and not missing:
            return self.record.contents
        names = ", ".join(map(str, missing[:5])) + "…" * (len(missing) > 5)
        what = f"{len(missing)} of {self.record.n_shards} shards are missing ({names})"
        raise StoreError(
            f"This store is incomplete: {what if missing else 'its recording was interrupted'}",
            where=self.folder,
            fix="Run the same visae record command again; it resumes",
        )

    def _read_shards(self) -> tuple[ShardFiles, ...]:
        """The files of every shard."""
        ref = self._contents.shards
        verify_file(self.folder, ref)
        shards = read_record(ShardTable, self.folder / ref.name, error=StoreError).shards
        sites = set(self.sites)
        if len(shards) != self.record.n_shards or any(set(s.files) != sites for s in shards):
            raise StoreError(
                "The list of shards belongs to another recording",
                where=self.folder / ref.name,
                fix="Delete it and run the same visae record command again; it resumes",
            )
        return shards

    @functools.cached_property
    def _statistics(self) -> dict[str, Tensor]:
        verify_file(self.folder, self._contents.statistics)
        return read_tensors(self.folder / self._contents.statistics.name)

    def _patch_labels_of(self, shard: int) -> dict[str, Tensor]:
        ref = self._shards[shard].patch_labels
        if ref is None:
            raise StoreError("A shard has no patch labels", where=self.folder, fix=_FIX)
        verify_file(self.folder, ref)
        return read_tensors(self.folder / ref.name)

    def _expected_shape(self, site: str, index: int) -> tuple[int, int, int]:
        record = self.site(site)
        return (self.n_images_in_shard(index), self.tokens_per_image(site), record.d_model)
