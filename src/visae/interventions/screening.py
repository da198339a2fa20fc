"""Which class is worth a hypothesis: every class's best feature, tried on discovery images.

Exploratory by construction: it looks at discovery images alone, without controls, and its numbers
decide only what is registered. Source: RIGOR §5.
"""

import dataclasses
from collections.abc import Sequence

import torch

from visae.errors import ExperimentError
from visae.interventions.discovery import Profiles, live_precision
from visae.interventions.edits import Edit, scope_tokens
from visae.interventions.effects import Condition, Laboratory, measure
from visae.interventions.tasks import class_index, read_outcome
from visae.progress import Progress, ProgressCallback, silent

__all__ = ["ClassCandidate", "best_features", "screen_classes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassCandidate:
    """A class's best feature on the discovery images."""

    class_name: str
    """The class."""
    feature: int
    """The feature with the highest average precision for it."""
    score: float
    """That average precision."""
    prevalence: float
    """Share of discovery images with the class: average precision by chance."""
    effect: float | None = None
    """Mean change of the class's probability when the feature is ablated, if it was tried."""


def best_features(profiles: Profiles, labels: Sequence[str | None]) -> list[ClassCandidate]:
    """The best feature of each class; ``labels`` are those of the discovery images.

    Raises:
        ExperimentError: when no discovery image has a label, or no feature fires.
    """
    classes = sorted({label for label in labels if label is not None})
    if not classes:
        raise ExperimentError(
            "No discovery image has a label",
            fix="Give images with labels: class subfolders, or a manifest with a label column",
        )
    position = {name: index for index, name in enumerate(classes)}
    indices = torch.tensor([position.get(label or "", -1) for label in labels])
    best = live_precision(profiles, indices, len(classes)).max(dim=0)
    n_labelled = int((indices >= 0).sum())
    return [
        ClassCandidate(
            class_name=name,
            feature=int(best.indices[index]),
            score=float(best.values[index]),
            prevalence=int((indices == index).sum()) / n_labelled,
        )
        for index, name in enumerate(classes)
    ]


def screen_classes(
    laboratory: Laboratory,
    profiles: Profiles,
    candidates: Sequence[ClassCandidate],
    *,
    n_images: int = 30,
    progress: ProgressCallback = silent,
) -> list[ClassCandidate]:
    """The candidates with the effect of ablating each on some discovery images of its class."""
    labels = laboratory.store.images.labels
    allowed = scope_tokens(laboratory.model.layout(laboratory.site), "patches")
    tried = []
    for done, candidate in enumerate(candidates, start=1):
        rows = [row for row in profiles.rows if labels[row] == candidate.class_name][:n_images]
        condition = Condition(
            edit=Edit(feature=candidate.feature, operation="ablate"),
            allowed=allowed,
            active_only=False,
            observed_max=profiles.of(candidate.feature).maximum,
            directions=torch.zeros(0, laboratory.sae.d_model),
        )
        effects = measure(laboratory, rows, condition)
        index = class_index(laboratory.task, candidate.class_name)
        before = read_outcome(effects.baseline, index, "probability")
        after = read_outcome(effects.edited, index, "probability")
        tried.append(dataclasses.replace(candidate, effect=float((after - before).mean())))
        progress(Progress(stage="screen", done=done, total=len(candidates), unit="classes"))
    return tried
