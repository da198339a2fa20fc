"""Fills the mixing buffer, or any memory for whole images, by running a model on images."""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from visae.activations.decoding import DecodedImage, Decoding, decoded_images
from visae.errors import ConfigError, ImageError, ModelError
from visae.images.source import ImageSource
from visae.models.layout import Layout, TokenPolicy
from visae.models.protocol import VisionModel

__all__ = ["ModelFiller"]


@final
class ModelFiller:
    """A ``Filler`` that computes tokens, in bfloat16 as a store has them by default.

    Images that cannot be read are left out and noted in ``skipped``.

    Raises:
        ModelError: when the model has no such site or tokens, or the sites differ in layout.
    """

    images_per_run = 1
    """Images are taken one by one in random order."""
    dtype = torch.bfloat16
    """As a store has it by default."""

    def __init__(
        self,
        source: ImageSource,
        model: VisionModel,
        sites: Sequence[str],
        tokens: TokenPolicy,
        *,
        batch_size: int,
        workers: int,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise ConfigError(
                f"The model sees {batch_size} images at a time, read by {workers} processes",
                fix="Give one image or more, and 0 processes or more",
            )
        self.widths = {site: model.d_model(site) for site in sites}
        self.positions = _only_layout(model, sites).kept(tokens)
        self.skipped: dict[str, str] = {}
        self._entries, self._model, self._batch_size = source.entries, model, batch_size
        self._decoding = Decoding(
            source=source,
            preprocessing=model.preprocessing,
            workers=workers,
            n_ahead=2 * batch_size,
        )

    def fill(
        self,
        images: Int64[np.ndarray, " image"],
        into: Mapping[str, Float[Tensor, "slot position _"]],
        stop: threading.Event,
    ) -> Int64[np.ndarray, " filled"]:
        """Run the model on the images that can be read, and put their tokens into the slots.

        Raises:
            ImageError: when no image of the source can be read.
            ModelError: when the model gives NaN or infinite activations.
        """
        filled: list[int] = []
        for rows, views in self._batches(images):
            if stop.is_set():
                break
            pixels = self._model.preprocessing.normalise(torch.from_numpy(np.stack(views)))
            found = self._model.tokens(pixels, list(self.widths))
            for site, slots in into.items():
                stored = found[site][:, self.positions].to(self.dtype)
                self._require_finite(stored, rows, site)
                slots[len(filled) : len(filled) + len(rows)].copy_(stored)
            filled += rows
        if len(self.skipped) == len(self._entries):
            ref, reason = next(iter(self.skipped.items()))
            raise ImageError(
                f"None of the {len(self._entries)} images can be read; one of them: {reason}",
                where=ref,
                fix="Mend the images or give others",
            )
        return np.array(filled, dtype=np.int64)

    def _batches(
        self, images: Int64[np.ndarray, " image"]
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Rows and views of the images that can be read, as many as the model sees at a time."""
        entries = [self._entries[row] for row in images.tolist()]
        with decoded_images(self._decoding, entries) as decoded:
            readable = self._readable(zip(images.tolist(), decoded, strict=True))
            while batch := list(itertools.islice(readable, self._batch_size)):
                yield [row for row, _ in batch], [image.view for _, image in batch]

    def _readable(
        self, decoded: Iterator[tuple[int, DecodedImage | ImageError]]
    ) -> Iterator[tuple[int, DecodedImage]]:
        for row, image in decoded:
            if isinstance(image, ImageError):
                self.skipped[self._entries[row].ref] = image.what
            else:
                yield row, image

    def _require_finite(
        self, stored: Float[Tensor, "image position _"], rows: Sequence[int], site: str
    ) -> None:
        finite = torch.isfinite(stored).flatten(1).all(dim=1)
        if not finite.all():
            bad = self._entries[rows[int((~finite).nonzero()[0])]].ref
            raise ModelError(
                f"The model gives NaN or infinite activations at {site} for image {bad}",
                where=self._model.identity.name,
                fix="Look at that image and at the weights",
            )


def _only_layout(model: VisionModel, sites: Sequence[str]) -> Layout:
    layouts = {model.layout(site) for site in sites}
    if len(layouts) == 1:
        return layouts.pop()
    raise ModelError(
        f"The sites have {len(layouts)} token layouts instead of one",
        where=", ".join(sites) or model.identity.name,
        fix="Name one site, or several of the same layout",
    )
