"""``StoredTokens``: what loading and training need of activations on disk, whoever wrote them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from visae.activations.format import DType, SiteRecord
from visae.activations.statistics import SiteStatistics
from visae.activations.store import PatchLabels, Shard
from visae.activations.token_files import TokenFile
from visae.images.catalog import ImageTable
from visae.models.config import ModelIdentity
from visae.models.layout import TokenPolicy
from visae.models.preprocessing import Preprocessing

__all__ = ["StoredTokens"]


@runtime_checkable
class StoredTokens(Protocol):
    """Activations of images at some sites, on disk."""

    @property
    def folder(self) -> Path:
        """Where they are."""

    @property
    def identity(self) -> ModelIdentity:
        """The model they are of."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images became its input, where that is known."""

    @property
    def digest(self) -> str:
        """Hash that tells these activations from others."""

    @property
    def dtype(self) -> DType:
        """Their number format."""

    @property
    def tokens(self) -> TokenPolicy:
        """Which tokens of each image were kept."""

    @property
    def n_images(self) -> int:
        """Images recorded."""

    @property
    def images(self) -> ImageTable:
        """What is known of each image, in row order."""

    @property
    def sites(self) -> Sequence[str]:
        """The recorded sites."""

    def site(self, name: str) -> SiteRecord:
        """Width and layout of a site.

        Raises:
            StoreError: when the site was not recorded.
        """

    def tokens_per_image(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Kept tokens of one image at a site, all or those of a policy."""

    def n_tokens(self, site: str, tokens: TokenPolicy | None = None) -> int:
        """Tokens recorded at a site, all or those of a policy."""

    def statistics(self, site: str, tokens: TokenPolicy | None = None) -> SiteStatistics:
        """Mean, scale and norms over all stored tokens, or a policy's."""

    def patch_labels(self, site: str) -> PatchLabels:
        """The class of every patch, by the images' masks.

        Raises:
            StoreError: when there were no masks.
        """

    @property
    def n_shards(self) -> int:
        """Number of shards that it is read in."""

    def n_images_in_shard(self, index: int) -> int:
        """Images in one shard."""

    def shards(self, site: str, tokens: TokenPolicy | None = None) -> Iterator[Shard]:
        """Every shard of a site, in order: all its tokens, or those of a policy."""

    def rows(
        self, site: str, shard: int, images: slice, tokens: TokenPolicy | None = None
    ) -> Float[Tensor, "image token d_model"]:
        """Some images of a shard."""

    def token_files(self, site: str) -> list[TokenFile]:
        """The files of a site, in the order of the images.

        Raises:
            StoreError: when one is missing, cut short or of another shape.
        """
