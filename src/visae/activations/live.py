"""``LiveTokens``: a stream of tokens from a running model, with nothing on disk.

The images come in a random order each pass; the model runs on some of them at a time and their
tokens fill the mixing buffer, from which batches are drawn as from a store. One forward pass feeds
all sites asked for, and so every SAE of a group.
"""

import functools
from collections.abc import Generator
from typing import final

import numpy as np
import torch

from visae.activations.filling import TokenBatch, in_order
from visae.activations.mixing import seeded
from visae.activations.mixing_buffer import LoaderState, MixedTokens
from visae.activations.model_filler import ModelFiller
from visae.activations.normalisation import Normalisation
from visae.activations.selection import Selection
from visae.errors import ImageError
from visae.images.catalog import Skipped
from visae.images.source import ImageSource, StreamedSource
from visae.models.config import ModelIdentity
from visae.models.layout import Layout, TokenPolicy
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import VisionModel
from visae.storage.hashing import hash_json
from visae.storage.records import to_plain

__all__ = ["LiveTokens"]

_MEASURED_TOKENS = 65_536
_REFERENCE_IMAGES = 8
_REFERENCE_TOKENS = 64


@final
class LiveTokens:
    """Endless batches of mixed tokens of a model on images, at one or several sites.

    In each pass over the images every token of those that can be read comes exactly once.
    ``state`` says where the stream stands; set it to what it was and the stream goes on from
    there, after the model has filled the buffer again (bit for bit on the CPU).

    Args:
        source: The images.
        model: The model; only its part up to the last site runs.
        sites: Sites of the model, of the same layout: each batch has the same tokens at all.
        tokens: Which tokens of each image.
        batch_size: Tokens in a batch.
        buffer_bytes: Memory for mixing. Where all tokens fit, the model runs once on each image.
            Without it, what the batch size needs to mix well, within 1 and 4 GiB.
        seed: Fixes the order.
        images_per_forward: Images that the model sees at a time.
        workers: Processes that read images; 0 for threads of this process.

    Raises:
        ImageError: when there are no images, they can only be read in order, or later, when none
            can be read.
        StoreError: when the images, or half the buffer, have fewer tokens than a batch.
        ModelError: when the model has no such site or tokens, the sites have different layouts,
            or later, when it gives NaN or infinite activations (naming image and site).
    """

    def __init__(
        self,
        source: ImageSource,
        model: VisionModel,
        *sites: str,
        tokens: TokenPolicy = "patches",
        batch_size: int,
        buffer_bytes: int | None = None,
        seed: int = 0,
        images_per_forward: int = 32,
        workers: int = 0,
    ) -> None:
        _check_source(source)
        self.sites, self.tokens, self.batch_size = sites, tokens, batch_size
        self._source, self._model, self._seed = source, model, seed
        self._filler = ModelFiller(
            source, model, sites, tokens, batch_size=images_per_forward, workers=workers
        )
        per_image = self._filler.positions.stop - self._filler.positions.start
        self._selection = Selection.everything(len(source.entries), per_image)
        self._mixed = MixedTokens(
            self._filler,
            self._selection,
            batch_size=batch_size,
            buffer_bytes=buffer_bytes,
            seed=seed,
        )

    @property
    def state(self) -> LoaderState:
        """Where the stream stands."""
        return self._mixed.state

    @state.setter
    def state(self, state: LoaderState) -> None:
        self._mixed.state = state

    def __iter__(self) -> Generator[TokenBatch]:
        return iter(self._mixed)

    @property
    def skipped(self) -> list[Skipped]:
        """Images that could not be read so far, with the reasons."""
        return [Skipped(ref, reason) for ref, reason in sorted(self._filler.skipped.items())]

    @property
    def model(self) -> ModelIdentity:
        """The model that runs."""
        return self._model.identity

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become its input."""
        return self._model.preprocessing

    @property
    def images(self) -> str:
        """Where the images are."""
        return self._source.location

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the list of images, the model's weights and its preprocessing."""
        refs = [entry.ref for entry in self._source.entries]
        return hash_json([refs, self.model.weights_sha256, to_plain(self.preprocessing)])

    def layout(self, site: str) -> Layout:
        """Order of the model's tokens at a site."""
        return self._model.layout(site)

    def d_model(self, site: str) -> int:
        """Width of the activations at a site."""
        return self._model.d_model(site)

    def normalisation(self, site: str) -> Normalisation:
        """Mean and scale over random images with 65 536 tokens, or all images if they have fewer.

        The first call runs the model on these images; the others remember.
        """
        return self._normalisations[site]

    @functools.cached_property
    def _normalisations(self) -> dict[str, Normalisation]:
        n_images = len(self._source.entries)
        n_wanted = -(-_MEASURED_TOKENS // len(self._selection.positions))
        order = torch.randperm(n_images, generator=seeded(self._seed, 2**32)).numpy()
        images = np.sort(order[: min(n_wanted, n_images)])
        batches = list(in_order(self._filler, self._selection, images))
        return {
            site: Normalisation.of_tokens(batch.activations[site] for batch in batches)
            for site in self.sites
        }

    def reference(self) -> TokenBatch:
        """Some tokens of the first images that can be read, for a checkpoint to prove itself on."""
        batches = in_order(
            self._filler, self._selection, self._selection.images, n_slots=_REFERENCE_IMAGES
        )
        found = next((batch for batch in batches if len(batch.images)), None)
        if found is None:
            raise ImageError("None of the images can be read", where=self.images)
        return found.every(max(1, len(found.images) // _REFERENCE_TOKENS))


def _check_source(source: ImageSource) -> None:
    if not source.entries:
        raise ImageError("There are no images", where=source.location, fix="Give other images")
    if isinstance(source, StreamedSource) and source.is_stream:
        raise ImageError(
            "These images can only be read one after another, and training on a running model "
            "needs them in random order",
            where=source.location,
            fix="Record them first with: visae record; then train on the store",
        )
