"""Images of a store again as pixels, and the model's trace of them at a site."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.models.protocol import Trace, VisionModel

__all__ = ["TracedImages", "take", "traced_images"]


class TracedImages(NamedTuple):
    """Some images of a store, run through the model."""

    rows: list[int]
    """Their rows in the store."""
    trace: Trace
    """Tokens at the site, and the output."""


def traced_images(
    store: ActivationStore,
    source: ImageSource,
    model: VisionModel,
    site: str,
    rows: Sequence[int],
    *,
    batch_size: int = 16,
) -> Iterator[TracedImages]:
    """Forward passes over images of a store, batch by batch.

    Raises:
        ExperimentError: when an image has changed since it was recorded.
    """
    for start in range(0, len(rows), batch_size):
        chosen = list(rows[start : start + batch_size])
        pixels = _pixels(store, source, chosen)
        yield TracedImages(chosen, model.trace(pixels, [site]))


def _pixels(
    store: ActivationStore, source: ImageSource, rows: Sequence[int]
) -> Float[Tensor, "image 3 height width"]:
    views = []
    for row in rows:
        loaded = source.load(store.images.refs[row])
        if loaded.content_id != store.images.content_ids[row]:
            raise ExperimentError(
                "This image has changed since it was recorded",
                where=store.images.refs[row],
                fix="Restore it, or record the images again",
            )
        views.append(store.record.preprocessing.view(loaded.pixels))
    return store.record.preprocessing.pixels(views)


def take(trace: Trace, site: str, images: Int64[Tensor, " copy"]) -> Trace:
    """Some images of a trace at one site, each as often as it is named (no output kept)."""
    entry = trace.entry[site]
    return Trace(
        tokens={site: trace.tokens[site][images]},
        entry={site: entry[images.to(entry.device)]},
        output=trace.output,
    )
