"""What an experiment found, as the file ``result.json``. Source: RIGOR §8."""

import dataclasses
from typing import Any, Literal

from visae.interventions.tasks import Pool
from visae.interventions.verdict import Verdict
from visae.models.config import ModelIdentity
from visae.statistics.estimates import Estimate

__all__ = [
    "ClassChange",
    "ControlResult",
    "CurveName",
    "DoseCurve",
    "EditSize",
    "ExperimentResult",
    "ImageOutcome",
    "ProbeResult",
    "Registration",
    "SelectionResult",
]


CurveName = Literal["suppression", "insertion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registration:
    """The file ``registration.json``: the spec fixed before the confirmation images were used."""

    kind: str = "registration"
    """Always ``registration``."""
    format: int = 1
    """Version of this format."""
    spec: dict[str, Any]
    """The spec's canonical form: its settings, with the SAE and the store by content."""
    spec_sha256: str
    """Hash of that form."""
    registered_at: str
    """When, as UTC in ISO 8601."""
    visae_version: str
    """Version of visae."""
    feature: int
    """The feature that the selection chose."""
    selection_rule: str
    """How it was chosen."""
    n_candidates: int
    """Features that were searched."""
    discovery_digest: str
    """Hash of the content ids that the selection saw."""
    confirmation_digest: str
    """Hash of the confirmation images' content ids."""
    labels_digest: str
    """Hash of all images with their labels and groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionResult:
    """The feature and how it was chosen."""

    feature: int
    """Its number."""
    rule: str
    """How it was chosen."""
    n_candidates: int
    """Features that were searched."""
    score: float | None
    """Average precision on discovery."""
    confirmation_score: float | None
    """Average precision on confirmation, which did not choose it."""
    prevalence: float | None
    """Share of confirmation images with the class: average precision by chance."""
    density: float
    """Share of discovery tokens at which it fires."""
    q99: float
    """99th percentile of its positive activations on discovery."""
    maximum: float
    """Its largest activation on discovery."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The task."""

    pool: Pool
    """Which final token it reads."""
    regularisation: float
    """C chosen by cross-validation."""
    discovery_accuracy: float
    """Cross-validated accuracy on the discovery images."""
    confirmation_accuracy: float
    """Accuracy on the confirmation images used here, unedited, each class weighing the same."""
    chance: float
    """Accuracy of always naming the largest class of the discovery images."""
    confirmation_chance: float
    """Accuracy of a constant answer on the confirmation images, each class weighing the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditSize:
    """How large the edit was."""

    mean_relative_norm: float
    """Mean ‖Δx‖ / ‖x‖ over changed tokens."""
    n_images_changed: int
    """Images in which at least one token changed."""
    n_tokens_changed: int
    """Tokens changed."""
    share_off_distribution: float
    """Share of changed tokens whose new activation was never seen: over twice the maximum, or
    below zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlResult:
    """The edit against one family of controls."""

    name: str
    """The family."""
    members: tuple[int, ...]
    """Feature numbers, for matched features."""
    mean_effects: tuple[float, ...]
    """Mean effect of each draw over the images."""
    difference: Estimate
    """Mean over images of the edit's effect less the controls' mean effect."""
    effect_size: Estimate
    """Cohen's d_z of that difference."""
    paired_p: float
    """Sign-flip permutation p-value over images."""
    direction_p: float
    """p-value of the edit's mean effect among the draws' mean effects."""
    verdict: Verdict
    """The verdict against this family alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """Mean change of the outcome at each dose, for the feature and for random directions."""

    name: CurveName
    """Where the concept is, or where it is not."""
    doses: tuple[float, ...]
    """Factors on the feature, or amounts added in units of q99."""
    changes: tuple[Estimate, ...]
    """Mean change of the outcome, the feature edited."""
    control_changes: tuple[Estimate, ...]
    """Mean change of the outcome over random directions of the same norm."""
    rho: Estimate
    """Spearman's correlation of dose and outcome, mean over images."""
    n_images: int
    """Images."""
    edit_sizes: tuple[EditSize, ...]
    """How large the edit was at each dose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassChange:
    """What the edit does to the images of one class."""

    class_name: str
    """The class of the images."""
    n_images: int
    """Images."""
    n_images_changed: int
    """Images in which at least one token changed."""
    outcome_change: Estimate
    """Mean change of the measured outcome (the target class's score)."""
    own_probability_change: Estimate
    """Mean change of the probability of the images' own class."""
    share_predictions_changed: float
    """Share of images whose predicted class changed."""
    became: dict[str, int]
    """Where changed predictions went."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOutcome:
    """One image, for the figures of the most and least affected ones."""

    row: int
    """Row in the store."""
    content_id: str
    """Content id."""
    baseline: float
    """Outcome without the edit."""
    edited: float
    """Outcome with the edit."""
    predicted: str
    """Predicted class without the edit."""
    predicted_edited: str
    """Predicted class with the edit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentResult:
    """The file ``result.json``."""

    kind: str = "experiment result"
    """Always ``experiment result``."""
    format: int = 1
    """Version of this format."""
    visae_version: str
    """Version of visae."""
    name: str
    """Name of the experiment."""
    hypothesis: str
    """The claim."""
    spec: dict[str, Any]
    """The spec in full, each path by its last name."""
    spec_sha256: str
    """Its hash."""
    registered_at: str
    """When it was registered."""
    status: Literal["confirmatory", "exploratory"]
    """Whether the result may count as a confirmation."""
    status_reasons: tuple[str, ...]
    """Why it is exploratory, if it is."""
    model: ModelIdentity
    """The vision model."""
    sae_sha256: str
    """Hash of the SAE's weights file."""
    store_digest: str
    """Hash of the activation store."""
    n_discovery: int
    """Discovery images."""
    n_confirmation: int
    """Confirmation images, of all classes."""
    n_images: int
    """Confirmation images of the class, on which the verdict rests."""
    selection: SelectionResult
    """The feature."""
    probe: ProbeResult
    """The task."""
    edit_size: EditSize
    """How large the edit was."""
    baseline: Estimate
    """Mean outcome without the edit."""
    edited: Estimate
    """Mean outcome with the edit."""
    effect: Estimate
    """Mean change under the edit."""
    controls: tuple[ControlResult, ...]
    """The edit against each family of controls."""
    verdict: Verdict
    """The verdict of the family that the claim holds against least."""
    dose_curves: tuple[DoseCurve, ...]
    """How the outcome follows the dose."""
    classes: tuple[ClassChange, ...]
    """Specificity: what the edit does to the images of each class, the target's first."""
    most_affected: tuple[ImageOutcome, ...]
    """Images whose outcome changed most."""
    least_affected: tuple[ImageOutcome, ...]
    """Images whose outcome changed least."""
    warnings: tuple[str, ...]
    """What limits the result, in sentences."""
    command: str
    """The command that reproduces it."""
