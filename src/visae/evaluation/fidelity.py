"""What the network makes of reconstructions: run it with x̂ in place of x at the SAE's site.

    cosine       cos of the final CLS token, and of the mean of the final patches, with the
                 originals
    score kept   (score(x̂) − score(x̄)) / (score(x) − score(x̄)), summed over images

Tokens that the SAE does not read stay as they are. x̄ is the mean activation, put at every token
that the SAE reads. Source: METHODS §6.

Main names: ``splice_in``, ``SplicedOutcomes``, ``ImageScore``.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from visae.errors import ModelError
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.tokens import EvaluatedTokens, spread_evenly
from visae.images.source import ImageSource
from visae.models.protocol import Output, Trace, VisionModel
from visae.saes.sae import SAE

__all__ = ["MEAN", "ORIGINAL", "ImageScore", "SplicedOutcomes", "splice_in"]

MEAN = "mean activation"
ORIGINAL = "original"

ImageScore = Callable[[Output, Sequence[int]], Float[Tensor, " image"]]
"""A task: one score for each image, from the network's output and the images' rows in the store."""

Substitute = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]


@dataclasses.dataclass(frozen=True)
class SplicedOutcomes:
    """What the network gave for each image and each substitute."""

    rows: tuple[int, ...]
    """The images, as rows of the store."""
    cosines: Mapping[str, Mapping[str, Float64[Tensor, " image"]]]
    """By part of the output (``cls``, ``patches``), then by substitute."""
    scores: Mapping[str, Float64[Tensor, " image"]]
    """By substitute, ``ORIGINAL`` among them; empty without a task."""


@torch.no_grad()
def splice_in(
    saes: Mapping[str, SAE],
    tokens: EvaluatedTokens,
    model: VisionModel,
    source: ImageSource,
    *,
    score: ImageScore | None,
    config: EvaluateConfig,
    on_images: Callable[[int], None] = lambda _done: None,
) -> SplicedOutcomes:
    """Run images through the model with each SAE's reconstruction, and the mean, spliced in.

    ``source`` lists the images in the store's order (``ActivationStore.source``).

    Raises:
        ModelError: when the model is not the one that was recorded.
    """
    _require_recorded(model, tokens)
    substitutes = _substitutes(saes, tokens.mean.float())
    rows = spread_evenly(tokens.n_images, config.n_spliced_images).tolist()
    cosines: dict[str, dict[str, list[Tensor]]] = {}
    scores: dict[str, list[Tensor]] = {}
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        trace = _trace(model, source, batch, tokens.site)
        for name, output in _outputs(model, trace, tokens, substitutes):
            for part, cosine in _cosines(model, tokens.site, trace.output, output).items():
                cosines.setdefault(part, {}).setdefault(name, []).append(cosine)
            if score is not None:
                scores.setdefault(name, []).append(score(output, batch).double().cpu())
        if score is not None:
            scores.setdefault(ORIGINAL, []).append(score(trace.output, batch).double().cpu())
        on_images(start + len(batch))
    return SplicedOutcomes(
        rows=tuple(rows),
        cosines={
            part: {name: torch.cat(parts) for name, parts in by_name.items()}
            for part, by_name in cosines.items()
        },
        scores={name: torch.cat(parts) for name, parts in scores.items()},
    )


def _require_recorded(model: VisionModel, tokens: EvaluatedTokens) -> None:
    recorded = tokens.store.identity
    if not model.identity.same_weights(recorded):
        raise ModelError(
            "The weights of this model are not those that were recorded",
            where=f"{model.identity.title}; the store has {recorded.title}",
            fix="Load the model that the store names",
        )


def _substitutes(saes: Mapping[str, SAE], mean: Float[Tensor, " d_model"]) -> dict[str, Substitute]:
    def reconstruction(sae: SAE) -> Substitute:
        return lambda x: sae.forward(x.to(sae.mean.device))

    substitutes = {name: reconstruction(sae) for name, sae in saes.items()}
    return substitutes | {MEAN: mean.expand_as}


def _trace(model: VisionModel, source: ImageSource, rows: list[int], site: str) -> Trace:
    entries = [source.entries[row] for row in rows]
    views = [model.preprocessing.view(source.load(entry.ref).pixels) for entry in entries]
    return model.trace(model.preprocessing.pixels(views), [site])


def _outputs(
    model: VisionModel,
    trace: Trace,
    tokens: EvaluatedTokens,
    substitutes: Mapping[str, Substitute],
) -> Iterator[tuple[str, Output]]:
    """The network's output for each substitute of the tokens that the SAE reads."""
    original = trace.tokens[tokens.site]
    kept = model.layout(tokens.site).kept(tokens.policy)
    read = original[:, kept]
    for name, substitute in substitutes.items():
        spliced = original.clone()
        spliced[:, kept] = substitute(read.flatten(0, 1)).view_as(read).to(original)
        yield name, model.resume(trace, tokens.site, spliced)


def _cosines(
    model: VisionModel, site: str, original: Output, spliced: Output
) -> dict[str, Float64[Tensor, " image"]]:
    """Cosine of each part of the final tokens with the original."""
    before, after = _parts(model, site, original), _parts(model, site, spliced)
    return {
        name: nn.functional.cosine_similarity(before[name].double(), after[name].double()).cpu()
        for name in before
    }


def _parts(
    model: VisionModel, site: str, output: Output
) -> dict[str, Float[Tensor, "image d_out"]]:
    """The CLS token, where the model has one, and the mean of the patches."""
    layout = model.layout(site)
    if layout.n_tokens != output.tokens.shape[1]:  # a feature map at another resolution
        return {"patches": output.tokens.mean(1)}
    parts = {"patches": output.tokens[:, layout.kept("patches")].mean(1)}
    if "cls" in layout.special:
        parts["cls"] = output.tokens[:, layout.special_index("cls")]
    return parts
