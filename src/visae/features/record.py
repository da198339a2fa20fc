"""The feature index's format, version 1.

``index.json`` (an ``IndexRecord``) says what was indexed and what proves the files whole.
``codes/NNNNN.safetensors`` holds the sparse codes of one store shard's images, token after token;
``features.parquet`` a row of statistics a feature; ``examples.safetensors`` the examples of every
band; ``images.parquet`` the images that were looked at, row i being image i of the codes;
``thumbnails/`` the views of all images that serve as examples, named by content id.
"""

import dataclasses
from typing import Literal

from visae.features.config import IndexConfig
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.storage.tensors import FileRef

__all__ = [
    "BANDS",
    "Band",
    "CodesShard",
    "Example",
    "IndexRecord",
    "codes_name",
]

Band = Literal["top", "upper", "middle", "low", "random_active"]

BANDS: tuple[Band, ...] = ("top", "upper", "middle", "low", "random_active")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesShard:
    """The codes of one store shard's images."""

    first_image: int
    """Row of its first image."""
    n_images: int
    """Images in it."""
    n_entries: int
    """Active features of all their tokens."""
    file: FileRef
    """The file, with what proves it whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One image of a band of a feature."""

    image_row: int
    """Row of the image in the index."""
    content_id: str
    """Content id of the image."""
    max: float
    """The feature's largest activation on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """The file ``index.json``."""

    kind: str = "feature index"
    """Always ``feature index``."""
    format: int = 1
    """Version of this format."""
    visae_version: str
    """Version of visae that built it."""
    sae: str
    """The SAE's folder, relative to the index within a workspace, else absolute."""
    sae_name: str
    """Name of that folder; feature 12 of it is written ``name:12``."""
    sae_sha256: str
    """Checksum of the SAE's weights file."""
    store: str
    """The store's folder, relative to the index within a workspace, else absolute."""
    store_digest: str
    """Hash of the store's images and activations."""
    model: ModelIdentity
    """The vision model."""
    site: str
    """Where in it."""
    layout: Layout
    """Order of the model's tokens at the site, before the token policy."""
    tokens: TokenPolicy
    """Which tokens of each image were encoded."""
    preprocessing: Preprocessing
    """How images became the model's input; thumbnails are its views."""
    config: IndexConfig
    """What was asked for."""
    n_features: int
    """Number of features."""
    n_images: int
    """Images looked at."""
    n_shards: int
    """Number of code files."""
    classes: tuple[str, ...]
    """Class names of those images, sorted."""
    codes: tuple[CodesShard, ...] = ()
    """The code files, once all are written."""
    files: dict[str, FileRef] = dataclasses.field(default_factory=dict)
    """``features``, ``examples`` and ``images``, once written."""
    complete: bool = False
    """Whether everything is written."""

    @property
    def tokens_per_image(self) -> int:
        """Encoded tokens of one image."""
        return self.layout.n_kept(self.tokens)


def codes_name(index: int) -> str:
    """Where the codes of a store shard are, relative to the index."""
    return f"codes/{index:05d}.safetensors"
