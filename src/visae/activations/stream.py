"""``TokenStream``: endless batches of tokens to train on, from a store or from a running model."""

from collections.abc import Generator
from typing import Protocol, runtime_checkable

from visae.activations.filling import TokenBatch
from visae.activations.mixing_buffer import LoaderState
from visae.activations.normalisation import Normalisation
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing

__all__ = ["TokenStream"]


@runtime_checkable
class TokenStream(Protocol):
    """Endless batches of mixed tokens at one or several sites, the same for one seed."""

    state: LoaderState
    """Where the stream stands; set it to what it was, and the same batches follow."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that every batch has."""

    @property
    def batch_size(self) -> int:
        """Tokens in a batch."""

    @property
    def model(self) -> ModelIdentity:
        """The model whose activations they are."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images became its input, where that is known."""

    @property
    def tokens(self) -> TokenPolicy:
        """Which tokens of each image they are."""

    @property
    def images(self) -> str | None:
        """Where the images are that a live stream reads; None for a store."""

    @property
    def digest(self) -> str:
        """Hash that tells these tokens from others."""

    def layout(self, site: str) -> Layout:
        """Order of the model's tokens at a site."""

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""

    def normalisation(self, site: str) -> Normalisation:
        """Mean and scale of the tokens at a site; may read or compute many of them."""

    def reference(self) -> TokenBatch:
        """Some tokens of the first images, for a checkpoint to prove itself on."""

    def __iter__(self) -> Generator[TokenBatch]:
        """Batches from the state on; ``state`` follows them. Close it to stop what feeds it."""
