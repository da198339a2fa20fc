"""The activation store's format, version 1, as the dataclasses that are its JSON files.

``store.json`` says which model, images, sites and shards; each finished shard has
``shards/NNNNN.json`` (images and checksums), ``shards/NNNNN.safetensors`` (partial sums) and one
``SITE/NNNNN.safetensors`` a site with the tensor ``activations`` (image, token, d_model). A shard
counts as finished when its JSON file exists: it is written last.
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
    "RecordConfig",
    "ShardRecord",
    "SiteRecord",
    "StoreRecord",
    "shard_name",
]

DType = Literal["bfloat16", "float16", "float32"]

N_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one number in each format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What to record from each image, and how."""

    sites: tuple[str, ...] = ("residual@9",)
    """Where in the model: residual@N, mlp@N, attention@N or a module path."""
    tokens: TokenPolicy = "patches"
    """Which tokens of each image to keep."""
    dtype: DType = "bfloat16"
    """Number format of the stored activations."""
    batch_size: int = 32
    """Images in one forward pass."""
    shard_bytes: int = 64 * 2**20
    """Target size of a shard file; a shard is the unit of resuming."""

    def __post_init__(self) -> None:
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

    def bytes_per_image(self, widths: dict[str, tuple[int, int]]) -> int:
        """Stored bytes of one image, given (kept tokens, d_model) of each site."""
        return sum(tokens * width for tokens, width in widths.values()) * N_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site of a store."""

    name: str
    """Site as the user wrote it; also the name of its folder."""
    d_model: int
    """Width of its activations."""
    layout: Layout
    """Order of the model's tokens at this site, before the token policy."""


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
    sites: tuple[SiteRecord, ...]
    """The sites, in the order asked for."""
    complete: bool = False
    """Whether every shard is written and the statistics are merged."""

    @property
    def n_shards(self) -> int:
        """Number of shards when complete."""
        return -(-self.n_images_in_source // self.images_per_shard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """The file ``shards/NNNNN.json``: one finished shard."""

    kind: str = "activation shard"
    """Always ``activation shard``."""
    format: int = 1
    """Version of this format."""
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
    skipped: tuple[tuple[str, str], ...]
    """Images left out: how the source finds each, and why."""
    files: dict[str, FileRef]
    """The activation file of each site."""
    statistics: FileRef
    """The partial sums of this shard."""


def shard_name(index: int) -> str:
    """Name of a shard's files without extension: five digits."""
    return f"{index:05d}"
