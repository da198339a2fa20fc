"""``StoredTokens``: what loading and training need of activations on disk, whoever wrote them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from visae.activations.format import DType, SiteRecord
from visae.activations.statistics import SiteStatistics
from visae.activations.store import PatchLabels
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

    def statistics(self, site: str, tokens: TokenPolicy | None = None) -> SiteStatistics:
        """Mean, scale and norms over all stored tokens, or a policy's."""

    def patch_labels(self, site: str) -> PatchLabels:
        """The class of every patch, by the images' masks.

        Raises:
            StoreError: when there were no masks.
        """

    def token_files(self, site: str) -> list[TokenFile]:
        """The files of a site, in the order of the images.

        Raises:
            StoreError: when one is missing, cut short or of another shape.
        """
