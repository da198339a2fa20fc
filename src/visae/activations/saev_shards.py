"""Shard folders of the saev toolkit (protocol 2.1), read in place and never written.

A folder has ``metadata.json``, ``shards.json``, ``acts000000.bin`` … (float32, C order: image,
layer, token, dimension; the class token first) and ``labels.bin`` (one byte a patch) where its
images had masks. The pickle inside ``metadata.json`` is never decoded. Layer N is the site
``residual@N``. What the folder does not say stays unknown: the weights' hash, the preprocessing,
the images' content, and the grid unless the patches are a square number.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from visae.activations.format import DType, SiteRecord
from visae.activations.saev_metadata import read_saev_metadata
from visae.activations.statistics import SiteStatistics, add_up, token_kinds
from visae.activations.store import PatchLabels, Shard
from visae.activations.token_files import TokenFile, TokenReader
from visae.errors import StoreError, nearest_names
from visae.images.catalog import ImageTable
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.storage.hashing import hash_bytes

__all__ = ["SaevShards"]

_FLOAT_BYTES = 4
_SHARD_BYTES = 64 * 2**20
_FIX = "It was cut short or altered: copy or record it again"


@final
class SaevShards:
    """Activations that saev recorded, opened for reading.

    It is read in shards of its own, whole images of up to 64 MiB, because saev's files may be
    larger than the memory.

    Raises:
        StoreError: when the folder is of another protocol, incomplete, or a file is missing or
            cut short; when its layers are listed out of order, because saev's recorder stores
            such layers under wrong labels.
    """

    preprocessing: None = None
    """Not recorded."""
    dtype: DType = "float32"
    """saev stores nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._metadata = read_saev_metadata(self.folder)
        self._files = [self._checked(name, n) for name, n in self._metadata.shards]
        self._statistics: dict[str, Mapping[str, SiteStatistics]] = {}

    @property
    def identity(self) -> ModelIdentity:
        """Family and checkpoint by name; the hash of the weights is unknown."""
        name = f"{self._metadata.family}/{self._metadata.ckpt}"
        return ModelIdentity(name=f"saev/{name}", title=self._metadata.ckpt, weights_sha256="")

    @functools.cached_property
    def digest(self) -> str:
        """Hash of its two JSON files; saev has no checksums of the activations."""
        data = [(self.folder / name).read_bytes() for name in ("metadata.json", "shards.json")]
        return hash_bytes(b"\n".join(data))

    @property
    def tokens(self) -> TokenPolicy:
        """All tokens where there is a class token, else patches."""
        return "all" if self._metadata.cls_token else "patches"

    @property
    def n_images(self) -> int:
        """Images recorded."""
        return self._metadata.n_examples

    @functools.cached_property
    def images(self) -> ImageTable:
        """The images by number: the folder says neither what they are nor what they show."""
        nothing = (None,) * self.n_images
        return ImageTable(
            content_ids=tuple(f"{self.digest}:{row}" for row in range(self.n_images)),
            refs=tuple(str(row) for row in range(self.n_images)),
            labels=nothing,
            groups=nothing,
        )

    @property
    def sites(self) -> list[str]:
        """``residual@N`` of each recorded layer."""
        return [f"residual@{layer}" for layer in self._metadata.layers]

    def site(self, name: str) -> SiteRecord:
        """Width and layout of a site.

        Raises:
            StoreError: when the layer was not recorded.
        """
        if name not in self.sites:
            fix = f"Use one of its sites: {nearest_names(name, self.sites)}"
            raise StoreError(f"This store has no site {name}", where=self.folder, fix=fix)
        return SiteRecord(name=name, d_model=self._metadata.d_model, layout=self._layout)

    def n_tokens(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Tokens recorded at a site, all or those of a policy."""
        return self.n_images * self.tokens_per_image(site, tokens)

    def tokens_per_image(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Kept tokens of one image at a site, all or those of a policy."""
        return self.site(site).layout.n_kept(tokens or self.tokens)

    def statistics(self, site: str, tokens: TokenPolicy | None = None) -> SiteStatistics:
        """Mean, scale and norms, by one pass over the site, kept until the store is closed."""
        wanted: TokenPolicy = tokens or self.tokens
        self._layout.within(wanted, self.tokens)
        measured = self._measured(site)
        if wanted == self.tokens:
            return functools.reduce(SiteStatistics.beside, measured.values())
        return measured[wanted]

    def patch_labels(self, site: str) -> PatchLabels:
        """The class number of every patch; purity was not recorded and is given as 1.

        Raises:
            StoreError: when there is no ``labels.bin``, or it has another size.
        """
        path = self.folder / "labels.bin"
        shape = self.n_images, self._layout.n_patches
        if not path.is_file():
            fix = "Record images with masks"
            raise StoreError("This store has no patch labels", where=self.folder, fix=fix)
        if path.stat().st_size != math.prod(shape):
            what = f"The patch labels have {path.stat().st_size} bytes instead of {shape}"
            raise StoreError(what, where=path, fix=_FIX)
        labels = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(shape).int()
        classes = {value: str(value) for value in torch.unique(labels).tolist()}
        return PatchLabels(classes, labels, torch.ones(shape))

    def token_files(self, site: str) -> list[TokenFile]:
        """Where the layer's tokens are in each file."""
        image = self._metadata.tokens_per_example * self._metadata.d_model * _FLOAT_BYTES
        start = self.sites.index(self.site(site).name) * image
        stride = len(self.sites) * image
        return [TokenFile(path, start, n_images, stride) for path, n_images in self._files]

    @property
    def n_shards(self) -> int:
        """Number of shards that it is read in."""
        return -(-self.n_images // self._images_per_shard)

    def n_images_in_shard(self, index: int) -> int:
        """Images in one shard."""
        return min(self._images_per_shard, self.n_images - index * self._images_per_shard)

    def shard(self, site: str, index: int, tokens: TokenPolicy | None = None) -> Shard:
        """One shard of a site, read whole: all its tokens, or those of a policy."""
        images = slice(0, self.n_images_in_shard(index))
        first = index * self._images_per_shard
        return Shard(first_image=first, activations=self.rows(site, index, images, tokens))

    def shards(self, site: str, tokens: TokenPolicy | None = None) -> Iterator[Shard]:
        """Every shard of a site, in order: all its tokens, or those of a policy."""
        for index in range(self.n_shards):
            yield self.shard(site, index, tokens)

    def rows(
        self, site: str, shard: int, images: slice, tokens: TokenPolicy | None = None
    ) -> Float[Tensor, "image token d_model"]:
        """Some images of a shard."""
        wanted = np.arange(self.n_images_in_shard(shard))[images] + shard * self._images_per_shard
        width = self.site(site).d_model
        within = self._layout.within(tokens or self.tokens, self.tokens)
        found = torch.empty((len(wanted), within.stop - within.start, width))
        reader = TokenReader(
            self.token_files(site),
            skip_bytes=within.start * width * _FLOAT_BYTES,
            image_bytes=found.shape[1] * width * _FLOAT_BYTES,
        )
        with ThreadPoolExecutor(1) as thread:
            reader.read(wanted, found, thread)
        return found

    @property
    def _images_per_shard(self) -> int:
        per_image = self._metadata.tokens_per_example * self._metadata.d_model * _FLOAT_BYTES
        return max(1, _SHARD_BYTES // per_image)

    @functools.cached_property
    def _layout(self) -> Layout:
        n_patches = self._metadata.content_tokens_per_example
        side = math.isqrt(n_patches)
        return Layout(
            special=("cls",) if self._metadata.cls_token else (),
            grid=(side, side) if side * side == n_patches else (1, n_patches),
        )

    def _measured(self, site: str) -> Mapping[str, SiteStatistics]:
        """The statistics of special tokens and of patches."""
        if site not in self._statistics:
            kinds = token_kinds(self._layout, self.tokens)
            parts: dict[str, list[SiteStatistics]] = {kind: [] for kind in kinds}
            for shard in self.shards(site):
                for kind, positions in kinds.items():
                    parts[kind].append(SiteStatistics.of(shard.activations[:, positions]))
            self._statistics[site] = {kind: add_up(found) for kind, found in parts.items()}
        return self._statistics[site]

    def _checked(self, name: str, n_images: int) -> tuple[Path, int]:
        path = self.folder / name
        if not path.is_file():
            raise StoreError("A shard is missing", where=path, fix=_FIX)
        needed = n_images * len(self.sites) * self._metadata.image_bytes
        if (n_bytes := path.stat().st_size) < needed:
            what = f"This shard ends after {n_bytes} of {needed} bytes"
            raise StoreError(what, where=path, fix=_FIX)
        return path, n_images
