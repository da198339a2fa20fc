"""From logits to estimates, p-values and verdicts; no model is run here. Source: RIGOR §4, §6."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from visae.interventions.controls import ControlFamily
from visae.interventions.effects import Effects
from visae.interventions.result import (
    ClassChange,
    ControlResult,
    CurveName,
    DoseCurve,
    EditSize,
    ImageOutcome,
)
from visae.interventions.spec import StatisticsConfig
from visae.interventions.tasks import read_outcome
from visae.interventions.verdict import Prediction, Verdict, judge
from visae.statistics.estimates import Estimate, cohens_dz, dose_response, mean_interval
from visae.statistics.significance import correct, direction_null, paired_permutation

__all__ = [
    "Measured",
    "class_change",
    "compare_with_controls",
    "dose_curve",
    "edit_size",
    "image_outcomes",
    "overall_verdict",
]

_ALTERNATIVE = {"decrease": "less", "increase": "greater"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Effects read as one outcome, with what groups the images."""

    effects: Effects
    """Logits of the images."""
    index: int
    """Position of the target class."""
    measure: str
    """What is measured of it."""
    groups: Sequence[str | None] | None
    """What each image counts as, where several count as one."""
    settings: StatisticsConfig
    """Resampling."""

    @functools.cached_property
    def baseline(self) -> Float64[np.ndarray, " image"]:
        """Outcome without the edit."""
        return self._read(self.effects.baseline)

    @functools.cached_property
    def edited(self) -> Float64[np.ndarray, " image"]:
        """Outcome with the edit."""
        return self._read(self.effects.edited)

    @functools.cached_property
    def change(self) -> Float64[np.ndarray, " image"]:
        """Effect of the edit."""
        change: Float64[np.ndarray, " image"] = self.edited - self.baseline
        return change

    @functools.cached_property
    def control_changes(self) -> Float64[np.ndarray, "image draw"]:
        """Effect of each control."""
        n_images, n_draws, n_classes = self.effects.controls.shape
        flat = self._read(self.effects.controls.reshape(-1, n_classes))
        changes: Float64[np.ndarray, "image draw"] = (
            flat.reshape(n_images, n_draws) - self.baseline[:, None]
        )
        return changes

    def mean(self, values: Float64[np.ndarray, " image"]) -> Estimate:
        """Mean over images with its interval."""
        return mean_interval(values, **self.resampling)

    @property
    def resampling(self) -> dict[str, Any]:
        """Keywords of every bootstrap."""
        return {
            "groups": self.groups,
            "level": self.settings.level,
            "n_resamples": self.settings.n_resamples,
            "seed": self.settings.seed,
        }

    def _read(self, logits: Tensor) -> Float64[np.ndarray, " image"]:
        outcome: Float64[np.ndarray, " image"]
        outcome = read_outcome(logits, self.index, self.measure).numpy()
        return outcome


def compare_with_controls(
    measured: Measured, families: Sequence[ControlFamily], prediction: Prediction
) -> list[ControlResult]:
    """The edit against each family; the draws of ``effects`` are the families' in order."""
    results = []
    start = 0
    for family in families:
        stop = start + family.directions.shape[0]
        draws = measured.control_changes[:, start:stop]
        results.append(_against(measured, family, draws, prediction))
        start = stop
    return results


def _against(
    measured: Measured,
    family: ControlFamily,
    draws: Float64[np.ndarray, "image draw"],
    prediction: Prediction,
) -> ControlResult:
    alternative = _ALTERNATIVE[prediction.direction]
    difference = measured.change - draws.mean(axis=1)
    estimate = measured.mean(difference)
    paired = paired_permutation(
        difference,
        groups=measured.groups,
        alternative=alternative,  # type: ignore[arg-type]
        n_permutations=measured.settings.n_permutations,
        seed=measured.settings.seed,
    )
    direction = direction_null(
        float(measured.change.mean()),
        draws.mean(axis=0),
        alternative=alternative,  # type: ignore[arg-type]
    )
    paired_p = _corrected(paired.p_value, prediction.family_size)
    direction_p = _corrected(direction.p_value, prediction.family_size)
    return ControlResult(
        name=family.name,
        members=family.members,
        mean_effects=tuple(float(value) for value in draws.mean(axis=0)),
        difference=estimate,
        effect_size=cohens_dz(difference, **measured.resampling),
        paired_p=paired_p,
        direction_p=direction_p,
        verdict=judge(estimate, prediction, paired_p=paired_p, direction_p=direction_p),
    )


def _corrected(p_value: float, family_size: int) -> float:
    """Bonferroni over the registered family, of which this result is one member."""
    return float(correct(np.array([p_value]), method="bonferroni", family_size=family_size)[0])


def overall_verdict(results: Sequence[ControlResult]) -> Verdict:
    """The verdict that holds least: refuted before inconclusive before supported."""
    order = {"refuted": 0, "inconclusive": 1, "supported": 2}
    weakest = min(
        results,
        key=lambda r: (order[r.verdict.label], -max(r.paired_p, r.direction_p)),
    )
    return weakest.verdict


def dose_curve(
    name: CurveName,
    doses: Sequence[float],
    measured: Sequence[Measured],
) -> DoseCurve:
    """The change of the outcome at each dose, for the feature and for random directions."""
    outcomes = np.stack([m.edited for m in measured], axis=1)
    controls = [m.control_changes.mean(axis=1) for m in measured]
    response = dose_response(np.array(doses), outcomes, **measured[0].resampling)
    return DoseCurve(
        name=name,
        doses=tuple(doses),
        changes=tuple(m.mean(m.change) for m in measured),
        control_changes=tuple(m.mean(c) for m, c in zip(measured, controls, strict=True)),
        rho=response.rho,
        n_images=outcomes.shape[0],
        edit_sizes=tuple(edit_size(m.effects) for m in measured),
    )


def edit_size(effects: Effects) -> EditSize:
    """How large the edit was, over the images it changed."""
    changed = effects.n_changed > 0
    n_tokens = int(effects.n_changed.sum())
    weights = effects.n_changed.double()
    total = float((effects.relative_norm.double() * weights).sum())
    return EditSize(
        mean_relative_norm=total / max(1, n_tokens),
        n_images_changed=int(changed.sum()),
        n_tokens_changed=n_tokens,
        share_off_distribution=int(effects.n_off_distribution.sum()) / max(1, n_tokens),
    )


def class_change(measured: Measured, own: int, classes: Sequence[str]) -> ClassChange:
    """What the edit does to the images of one class."""
    effects = measured.effects
    before, after = effects.baseline.argmax(1), effects.edited.argmax(1)
    moved = before != after
    own_class = dataclasses.replace(measured, index=own, measure="probability")
    return ClassChange(
        class_name=classes[own],
        n_images=len(before),
        n_images_changed=int((effects.n_changed > 0).sum()),
        outcome_change=measured.mean(measured.change),
        own_probability_change=own_class.mean(own_class.change),
        share_predictions_changed=float(moved.double().mean()),
        became=dict(Counter(classes[int(i)] for i in after[moved]).most_common()),
    )


def image_outcomes(
    measured: Measured, content_ids: Sequence[str], classes: Sequence[str], n: int
) -> tuple[tuple[ImageOutcome, ...], tuple[ImageOutcome, ...]]:
    """The n images whose outcome changed most, and the n whose outcome changed least."""
    order = np.argsort(-np.abs(measured.change), kind="stable")
    most = tuple(_image(measured, int(i), content_ids, classes) for i in order[:n])
    least = tuple(_image(measured, int(i), content_ids, classes) for i in order[n:][::-1][:n])
    return most, least


def _image(
    measured: Measured, i: int, content_ids: Sequence[str], classes: Sequence[str]
) -> ImageOutcome:
    row = int(measured.effects.rows[i])
    return ImageOutcome(
        row=row,
        content_id=content_ids[row],
        baseline=float(measured.baseline[i]),
        edited=float(measured.edited[i]),
        predicted=classes[int(measured.effects.baseline[i].argmax())],
        predicted_edited=classes[int(measured.effects.edited[i].argmax())],
    )
