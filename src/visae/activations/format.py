"""The activation store's format, version 1, as the dataclasses that are its JSON files.

While it is recorded, a store is ``store.json`` (what is recorded from what) and for each finished
shard ``shards/NNNNN.json`` (its images and checksums), ``shards/NNNNN.safetensors`` (statistics),
one ``SITE/NNNNN.safetensors`` a site with the tensor ``activations`` (image, token, d_model), and
``labels/NNNNN.safetensors`` where the images have masks. A shard counts as finished when its JSON
file exists: it is written last. Completing the store gathers ``images.parquet``,
``statistics.safetensors``, ``shards.json`` and ``skipped.csv``, and then writes their checksums
into ``store.json``.
"""

import dataclasses
from typing import Literal

from visae.errors import ConfigError
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.storage.tensors import FileRef

__all__ = [
    "N_BYTES",
    "DType",
    "MaskClass",
    "Precision",
    "RecordConfig",
    "ShardFiles",
    "ShardRecord",
    "ShardTable",
    "SiteRecord",
    "StoreContents",
    "StoreRecord",
    "grid_name",
    "shard_name",
]

DType = Literal["bfloat16", "float16", "float32"]

Precision = Literal["float32", "bfloat16"]

N_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one number in each format."""

_TAKEN = {"labels", "shards"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What to record from each image, and how."""

    sites: tuple[str, ...] = ("residual@9",)
    """Where in the model: residual@N, mlp@N, attention@N, heads@N or a module path."""
    tokens: TokenPolicy = "patches"
    """Which tokens of each image to keep."""
    dtype: DType = "bfloat16"
    """Number format of the stored activations."""
    precision: Precision = "float32"
    """Number format in which the model computes; bfloat16 means automatic mixed precision."""
    batch_size: int = 32
    """Images in one forward pass."""
    shard_bytes: int = 64 * 2**20
    """Target size of a shard file; a shard is the unit of resuming."""
    workers: int | None = None
    """Processes that read images, 0 for threads of this one; without it, as the device needs."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ConfigError(
                "The number of workers cannot be negative",
                where=f"workers {self.workers}",
                fix="Give 0 to read images in this process",
            )
        if self.batch_size < 1 or self.shard_bytes < 1:
            raise ConfigError(
                "batch_size and shard_bytes must be positive",
                where=f"batch_size {self.batch_size}, shard_bytes {self.shard_bytes}",
                fix="Give numbers above zero",
            )
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ConfigError(
                "The sites must be at least one, each named once",
                where=f"sites: {', '.join(self.sites) or 'none'}",
                fix="Name each site once with --site",
            )
        if taken := _TAKEN.intersection(self.sites):
            raise ConfigError(
                f"A store has a folder {min(taken)} of its own, and a site's folder has its name",
                where=f"sites: {', '.join(self.sites)}",
                fix="Give the module another name",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site of a store."""

    name: str
    """Site as the user wrote it; also the name of its folder."""
    d_model: int
    """Width of its activations."""
    layout: Layout
    """Order of the model's tokens at this site, before the token policy."""

    def bytes_per_image(self, tokens: TokenPolicy, dtype: DType) -> int:
        """Stored bytes of one image at this site."""
        return self.layout.n_kept(tokens) * self.d_model * N_BYTES[dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskClass:
    """One class of the images' masks."""

    value: int
    """Value of its pixels in a mask."""
    name: str
    """What it is called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreContents:
    """What was gathered when the store was completed."""

    n_images: int
    """Images recorded; skipped ones excluded."""
    digest: str
    """Hash of the images and activations: equal for equal recordings, wherever they are."""
    images: FileRef
    """The table of images: content ids, references, labels, groups, metadata."""
    statistics: FileRef
    """The statistics of each site over all images."""
    shards: FileRef
    """The list of every shard's files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """The file ``store.json``."""

    kind: str = "activation store"
    """Always ``activation store``."""
    format: int = 1
    """Version of this format."""
    visae_version: str
    """Version of visae that recorded it."""
    model: str
    """Model name given to the loader."""
    weights: str | None
    """Local weights file, relative to the store within a workspace, else absolute."""
    revision: str | None = None
    """Commit, tag or branch of the hub's repository asked for, if any."""
    image_size: int | None
    """Input size asked for, if any."""
    identity: ModelIdentity
    """Which model it was, by content."""
    preprocessing: Preprocessing
    """How images became its input."""
    images: str
    """Location of the image source, relative to the store within a workspace, else absolute."""
    n_images_in_source: int
    """Images that the source listed, before any was skipped."""
    images_per_shard: int
    """Source images a shard covers; shard i covers rows i·n to (i+1)·n of the source."""
    tokens: TokenPolicy
    """Which tokens were kept."""
    dtype: DType
    """Number format of the stored activations."""
    precision: Precision = "float32"
    """Number format in which the model computed."""
    sites: tuple[SiteRecord, ...]
    """The sites, in the order asked for."""
    mask_classes: tuple[MaskClass, ...] | None = None
    """Classes of the patch labels, empty where the source names none; absent without masks."""
    contents: StoreContents | None = None
    """What was gathered when every shard was written; absent until then."""

    @property
    def complete(self) -> bool:
        """Whether every shard is written and everything gathered."""
        return self.contents is not None

    @property
    def n_shards(self) -> int:
        """Number of shards when complete."""
        return -(-self.n_images_in_source // self.images_per_shard)

    def n_listed(self, shard: int) -> int:
        """Images of the source that a shard covers, skipped ones included."""
        return min(self.images_per_shard, self.n_images_in_source - shard * self.images_per_shard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The file ``shards/NNNNN.json``: one finished shard."""

    kind: str = "activation shard"
    """Always ``activation shard``."""
    format: int = 1
    """Version of this format."""
    recording: str
    """Hash of what was recorded: shards of different recordings do not mix."""
    index: int
    """Number of the shard."""
    content_ids: tuple[str, ...]
    """Content id of each image, in row order."""
    refs: tuple[str, ...]
    """How the image source finds each image."""
    labels: tuple[str | None, ...]
    """Class of each image, where known."""
    groups: tuple[str | None, ...]
    """Group of each image, where known."""
    mask_ids: tuple[str | None, ...] = ()
    """Content id of each image's mask; empty where no image has one."""
    metadata: dict[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)
    """Whatever else the source says of each image, by name."""
    skipped: tuple[tuple[str, str], ...]
    """Images left out: how the source finds each, and why."""
    files: dict[str, FileRef]
    """The activation file of each site."""
    patch_labels: FileRef | None = None
    """The file of patch labels, where the source has masks."""
    statistics: FileRef
    """The statistics of this shard; the file is removed when the store is complete."""
    rounding: dict[str, tuple[float, ...]]
    """Σ‖stored − computed‖² over the images, for each site and kept token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The files of one shard of a complete store."""

    n_images: int
    """Images in it."""
    record: FileRef
    """Its JSON file."""
    files: dict[str, FileRef]
    """The activation file of each site."""
    patch_labels: FileRef | None = None
    """The file of patch labels, where the source has masks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTable:
    """The file ``shards.json``: every shard of a complete store, so that opening one is fast."""

    kind: str = "activation shards"
    """Always ``activation shards``."""
    format: int = 1
    """Version of this format."""
    shards: tuple[ShardFiles, ...]
    """The shards, in order."""


def shard_name(index: int) -> str:
    """Name of a shard's files without extension: five digits."""
    return f"{index:05d}"


def grid_name(grid: tuple[int, int]) -> str:
    """How a patch grid is called in names of tensors: rows, x, columns."""
    return f"{grid[0]}x{grid[1]}"
