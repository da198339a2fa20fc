"""The parts of a report card, each made of one kind of measurement.

Every function takes the SAE first and its baselines after it, by name, and gives rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from visae.errors import CheckpointError
from visae.evaluation.class_scores import ClassProbe, LabelledImages, permuted_figures
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.fidelity import MEAN, ORIGINAL, SplicedOutcomes
from visae.evaluation.metrics import Measurement
from visae.evaluation.rows import Metric, MetricRow, chance, compared, plain, uncomputed
from visae.evaluation.stability import Stability, live_directions, rotation_null, stability
from visae.evaluation.tokens import EvaluatedTokens
from visae.saes.sae import SAE
from visae.statistics.estimates import Estimate
from visae.statistics.resampling import Figures, Resampling, Weights, plan_resampling

__all__ = [
    "class_rows",
    "reconstruction_rows",
    "sparsity_rows",
    "spliced_rows",
    "stability_rows",
]

_DEFINED = "by definition"
_FEATURE_SHARES = "no interval: a share of features, not a mean over images"
_NOT_OF_IMAGES = "no interval: of directions, not of images"

_RECONSTRUCTION = (
    Metric("nmse", "NMSE", "lower", note="share of the variance of activations not rebuilt"),
    Metric("cosine", "cosine", "higher", note="of x̂ − x̄ and x − x̄"),
)
_L0 = Metric("l0", "L0", "neither", "features per token", "the baselines are built to have it")
_SPARSITY = (
    Metric("dead_share", "dead features", "lower", "share", "active at no token"),
    Metric("dense_share", "dense features", "lower", "share", "active at over 10 % of tokens"),
)
_CLASSES = (
    Metric("class_average_precision", "average precision of a class's best feature", "higher"),
    Metric("class_coverage", "classes covered", "higher", "share"),
    Metric("top_precision", "precision of the top", "higher", "share"),
)
_STABILITY = (
    Metric("stability_cosine", "stability: matched |cos|", "higher"),
    Metric("stability_share", "stability: features with cos > 0.7", "higher", "share"),
)
_PARTS = {
    "cls": Metric("final_cls_cosine", "cosine of the final CLS token, x̂ spliced in", "higher"),
    "patches": Metric(
        "final_patch_cosine", "cosine of the mean final patch, x̂ spliced in", "higher"
    ),
}
_SCORE = Metric("score_kept", "task score kept, x̂ spliced in", "higher", "share")


def reconstruction_rows(
    measured: Mapping[str, Measurement], resampling: Resampling
) -> list[MetricRow]:
    """NMSE, cosine and L0; the mean predictor x̂ = x̄ is a null of the first two."""
    n_images, n_units = len(resampling.units), resampling.n_independent
    by_definition = [
        Estimate(value=value, interval=None, n_images=n_images, n_units=n_units, note=_DEFINED)
        for value in (1.0, 0.0)
    ]
    rebuilt = {
        name: _ratios(
            resampling, (each.squared_error, each.spread), (each.cosine, torch.ones_like(each.l0))
        )
        for name, each in measured.items()
    }
    active = {
        name: _ratios(resampling, (each.l0, torch.ones_like(each.l0)))
        for name, each in measured.items()
    }
    return [
        *compared(
            _RECONSTRUCTION, rebuilt, resampling, constants={"mean predictor": by_definition}
        ),
        *compared([_L0], active, resampling, constants={}),
    ]


def sparsity_rows(measured: Mapping[str, Measurement]) -> list[MetricRow]:
    """Dead and dense features."""
    n_images = len(next(iter(measured.values())).l0)
    return [
        plain(
            metric,
            {name: float(getattr(each, metric.name)) for name, each in measured.items()},
            n_images=n_images,
            note=_FEATURE_SHARES,
        )
        for metric in _SPARSITY
    ]


def class_rows(
    probes: Mapping[str, ClassProbe], labelled: LabelledImages, config: EvaluateConfig
) -> list[MetricRow]:
    """Best features of classes, chosen on one side and scored on the other."""
    metrics = [metric._replace(note=_class_note(metric, labelled, config)) for metric in _CLASSES]
    n_images = int(labelled.confirms.sum())
    if labelled.problem:
        return [uncomputed(metric, labelled.problem, n_images=n_images) for metric in metrics]
    resampling = plan_resampling(
        n_images,
        groups=labelled.groups(),
        level=config.level,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    confirmation = labelled.classes[labelled.confirms]

    def figures(probe: ClassProbe) -> Callable[[Weights], Figures]:
        chosen = probe.choose(labelled.classes[~labelled.confirms]).features
        return lambda weights: probe.figures(
            chosen, confirmation, weights[:, resampling.units], config=config
        )

    own = next(iter(probes.values()))
    draws = permuted_figures(own, config=config)
    permuted = [
        chance(row, level=config.level, n_images=n_images, what="label permutations")
        for row in draws
    ]
    rows = compared(
        metrics,
        {name: figures(probe) for name, probe in probes.items()},
        resampling,
        constants={"permuted labels": permuted},
    )
    return [
        dataclasses.replace(row, p_value=_p_value(row.value.value, draw))
        for row, draw in zip(rows, draws, strict=True)
    ]


def stability_rows(
    sae: SAE, others: Sequence[SAE], tokens: EvaluatedTokens, config: EvaluateConfig
) -> list[MetricRow]:
    """Matched directions, averaged over the other SAEs, beside rotated dictionaries."""
    n_images = tokens.n_images
    if not others:
        reason = "it needs another SAE of the same site, for example of another seed"
        return [uncomputed(metric, reason, n_images=n_images) for metric in _STABILITY]
    for other in others:
        _require_width(sae, other)
    own = live_directions(
        sae, _live(sae, tokens, config), most=config.n_stability_features, seed=config.seed
    )
    found: list[Stability] = []
    rotated: list[Stability] = []
    for other in others:
        theirs = live_directions(
            other, _live(other, tokens, config), most=other.n_features, seed=config.seed
        )
        if not len(own) or not len(theirs):
            reason = "one of the SAEs has no live feature"
            return [uncomputed(metric, reason, n_images=n_images) for metric in _STABILITY]
        found.append(stability(own, theirs))
        rotated += rotation_null(own, theirs, n_rotations=config.n_rotations, seed=config.seed)
    rows = []
    note = f"{len(own)} live features, {len(others)} other SAE{'s' * (len(others) > 1)}"
    for metric, field in zip(_STABILITY, ("cosine", "share"), strict=True):
        values = {
            "sae": float(np.mean([getattr(each, field) for each in found])),
            "rotated dictionary": float(np.mean([getattr(each, field) for each in rotated])),
        }
        labelled = metric._replace(note=note)
        rows.append(plain(labelled, values, n_images=n_images, note=_NOT_OF_IMAGES))
    return rows


def spliced_rows(
    outcomes: SplicedOutcomes | None, tokens: EvaluatedTokens, config: EvaluateConfig
) -> list[MetricRow]:
    """What the network makes of the reconstruction, beside the mean activation."""
    if outcomes is None:
        reason = "it needs the model and the images"
        metrics = (*_PARTS.values(), _SCORE)
        return [uncomputed(metric, reason, n_images=0) for metric in metrics]
    resampling = plan_resampling(
        len(outcomes.rows),
        groups=[tokens.store.images.groups[row] for row in outcomes.rows],
        level=config.level,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )
    rows: list[MetricRow] = []
    for part, metric in _PARTS.items():
        if part not in outcomes.cosines:
            reason = f"this model's final tokens have no {part}"
            rows.append(uncomputed(metric, reason, n_images=len(outcomes.rows)))
            continue
        means = {
            name: _ratios(resampling, (values, torch.ones_like(values)))
            for name, values in outcomes.cosines[part].items()
        }
        rows += compared([metric], means, resampling, constants={})
    if not outcomes.scores:
        rows.append(uncomputed(_SCORE, "no task was given", n_images=len(outcomes.rows)))
        return rows
    full, none = outcomes.scores[ORIGINAL], outcomes.scores[MEAN]
    kept = {
        name: _ratios(resampling, (scores - none, full - none))
        for name, scores in outcomes.scores.items()
        if name != ORIGINAL
    }
    return rows + compared([_SCORE], kept, resampling, constants={})


def _class_note(metric: Metric, labelled: LabelledImages, config: EvaluateConfig) -> str:
    """What the figures of classes stand on."""
    own = {
        "class_coverage": f"average precision of at least {config.coverage_precision:g}; ",
        "top_precision": f"of the {config.n_top} images with the largest activations; ",
    }.get(metric.name, "")
    note = f"{own}{len(labelled.scored)} classes"
    if labelled.left_out:
        few = ", ".join(labelled.left_out[:5]) + ("…" if len(labelled.left_out) > 5 else "")
        note += f", too few images of {few}"
    return note


def _p_value(value: float | None, draws: Float64[np.ndarray, " draw"]) -> float | None:
    if value is None:
        return None
    return float((1 + (draws >= value - 1e-12).sum()) / (1 + len(draws)))


def _ratios(
    resampling: Resampling, *parts: tuple[Float64[Tensor, " image"], Float64[Tensor, " image"]]
) -> Callable[[Weights], Figures]:
    """Σ above / Σ below over weighted images, for each pair of per-image quantities."""
    sums = [
        (resampling.total(above.numpy()), resampling.total(below.numpy())) for above, below in parts
    ]

    def of_weights(weights: Weights) -> Figures:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([weights @ above / (weights @ below) for above, below in sums])

    return of_weights


def _live(sae: SAE, tokens: EvaluatedTokens, config: EvaluateConfig) -> Bool[Tensor, " feature"]:
    """Features that are active somewhere in a sample of tokens."""
    sample = tokens.sample(config.n_sampled_tokens, seed=config.seed).to(sae.mean.device)
    codes = sae.encode_sparse(sample)
    return torch.bincount(codes.features, minlength=sae.n_features) > 0


def _require_width(sae: SAE, other: SAE) -> None:
    if sae.d_model != other.d_model:
        raise CheckpointError(
            f"Directions of width {sae.d_model} cannot be matched with width {other.d_model}",
            where="stability",
            fix="Give SAEs of the same model and site",
        )
