"""An experiment as one page of HTML, made for a paper's supplement.

Verdict, controls, doses, specificity, images, and how it was done.

The page is one file: charts and pictures are inside it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions.result import (
    ClassChange,
    ControlResult,
    DoseCurve,
    ExperimentResult,
    ImageOutcome,
)
from visae.interventions.spec import read_spec
from visae.reports.charts import dose_response, effect_against_controls
from visae.reports.figures import heat_overlay
from visae.reports.page import picture_uri, svg_markup, write_page
from visae.reports.wording import estimated, fixed, number, percent, plural
from visae.saes.checkpoint import load_sae, read_sae_record
from visae.saes.hub import find_sae
from visae.statistics.estimates import Estimate
from visae.storage.records import read_record

__all__ = ["read_result", "write_experiment_report"]

_TILE = 96
_CURVE_LABELS = {
    "suppression": ("factor on the feature (1 changes nothing, 0 ablates)", "images of the class"),
    "insertion": ("amount added, in q99 of the feature (0 changes nothing)", "other images"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """One image with its outcome."""

    picture: str
    heat: str
    alt: str
    before: str
    after: str
    predicted: str


def read_result(folder: Path) -> ExperimentResult:
    """The result of an experiment.

    Raises:
        ExperimentError: when the folder holds no finished experiment, or its result is damaged.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise ExperimentError(
            "There is no finished experiment here",
            where=folder,
            fix="Run it with: visae intervene SPEC.toml --out DIR",
        )
    return read_record(ExperimentResult, path, error=ExperimentError)


def write_experiment_report(
    folder: Path, store: ActivationStore, source: ImageSource, *, out: Path | None = None
) -> Path:
    """Write ``report.html`` beside an experiment's result, or at ``out``, and give its path.

    Args:
        folder: Folder of the experiment.
        store: The store it ran on.
        source: The store's images.
        out: Another path for the page.

    Raises:
        ExperimentError: when the experiment is not finished, or an image has changed.
    """
    folder = Path(folder)
    result = read_result(folder)
    outcome = f"{result.spec['outcome']['measure']} of {result.spec['outcome']['class_name']}"
    target, *others = result.classes
    return write_page(
        out or folder / "report.html",
        "experiment.html",
        result=result,
        outcome=outcome,
        edit=_edit_words(result),
        facts=_facts(result),
        controls_chart=svg_markup(_controls_chart(result, outcome)),
        controls_words=_controls_words(result),
        controls=[_control_line(control) for control in result.controls],
        curves=[_curve(curve, outcome) for curve in result.dose_curves],
        classes=[_class_line(change) for change in (target, *others)],
        most=_images(folder, result, result.most_affected, store, source),
        least=_images(folder, result, result.least_affected, store, source),
        about=_about(result),
    )


def _edit_words(result: ExperimentResult) -> str:
    edit, feature = result.spec["edit"], result.selection.feature
    what = {
        "ablate": f"feature {feature} set to 0",
        "scale": f"feature {feature} multiplied by {edit['value']:g}",
        "set": f"feature {feature} set to {edit['value']:g} {edit['unit']}",
        "add": f"{edit['value']:g} {edit['unit']} added to feature {feature}",
    }[edit["operation"]]
    where = {
        "patches": "at every patch",
        "active-patches": "at the patches where it fires",
        "special": "at the special tokens",
        "all": "at every token",
    }[edit["scope"]]
    return f"{what} {where}"


def _facts(result: ExperimentResult) -> list[tuple[str, str]]:
    size = result.edit_size
    return [
        ("outcome without the edit", estimated(result.baseline)),
        ("with the edit", estimated(result.edited)),
        ("change", estimated(result.effect)),
        ("images", str(result.n_images)),
        ("images the edit changes", str(size.n_images_changed)),
        ("mean ‖Δx‖ / ‖x‖", number(size.mean_relative_norm)),
        ("off-distribution", percent(size.share_off_distribution)),
    ]


def _controls_chart(result: ExperimentResult, outcome: str) -> str:
    effect = result.effect.value or 0.0
    interval = result.effect.interval
    span = (effect, effect) if interval is None else (interval.low, interval.high)
    families = {control.name: control.mean_effects for control in result.controls}
    return effect_against_controls(effect, span, families, xlabel=f"mean change of the {outcome}")


def _controls_words(result: ExperimentResult) -> str:
    """What the chart shows, for a screen reader."""
    parts = [
        f"{plural(len(c.mean_effects), 'draw')} of {c.name} between {number(min(c.mean_effects))} "
        f"and {number(max(c.mean_effects))}"
        for c in result.controls
    ]
    return f"The edit changes the outcome by {estimated(result.effect)}; " + "; ".join(parts)


def _control_line(control: ControlResult) -> dict[str, str]:
    effects = np.array(control.mean_effects)
    return {
        "name": control.name,
        "draws": str(len(effects)),
        "mean": number(float(effects.mean())),
        "range": f"{number(float(effects.min()))} to {number(float(effects.max()))}",
        "difference": estimated(control.difference),
        "size": estimated(control.effect_size),
        "paired": number(control.paired_p, 2),
        "direction": number(control.direction_p, 2),
        "verdict": control.verdict.label,
    }


def _curve(curve: DoseCurve, outcome: str) -> dict[str, object]:
    xlabel, images = _CURVE_LABELS[curve.name]
    means = [change.value or 0.0 for change in curve.changes]
    bounds = [_bounds(change) for change in curve.changes]
    chart = dose_response(
        curve.doses,
        means,
        [low for low, _ in bounds],
        [high for _, high in bounds],
        xlabel=xlabel,
        ylabel=f"change of the {outcome}",
        beside=[change.value or 0.0 for change in curve.control_changes],
    )
    rho = estimated(curve.rho)
    steps = ", ".join(f"{d:g}: {number(m)}" for d, m in zip(curve.doses, means, strict=True))
    return {
        "title": curve.name.capitalize(),
        "chart": svg_markup(chart),
        "caption": (
            f"{curve.name.capitalize()} on {curve.n_images} {images}: mean change with its 95 % "
            f"interval; dashed, random directions of the same norm. Spearman's ρ of dose and "
            f"outcome {rho}, mean over images."
        ),
        "description": f"Mean change at each dose: {steps}",
    }


def _bounds(estimate: Estimate) -> tuple[float, float]:
    value = estimate.value or 0.0
    interval = estimate.interval
    return (value, value) if interval is None else (interval.low, interval.high)


def _class_line(change: ClassChange) -> dict[str, str]:
    became = ", ".join(f"{name} {n}" for name, n in list(change.became.items())[:4])
    return {
        "name": change.class_name,
        "images": str(change.n_images),
        "changed": str(change.n_images_changed),
        "outcome": estimated(change.outcome_change),
        "own": estimated(change.own_probability_change),
        "flipped": percent(change.share_predictions_changed),
        "became": became or "none",
    }


def _images(
    folder: Path,
    result: ExperimentResult,
    outcomes: Sequence[ImageOutcome],
    store: ActivationStore,
    source: ImageSource,
) -> list[_Shown]:
    """The images with the feature's heat map before the edit."""
    sae_folder = find_sae(read_spec(folder / "spec.toml").sae).folder
    sae, site = load_sae(sae_folder), read_sae_record(sae_folder).provenance.site
    layout = store.site(site).layout
    shown = []
    for one in outcomes:
        loaded = source.load(store.images.refs[one.row])
        if loaded.content_id != one.content_id:
            raise ExperimentError(
                "This image has changed since the experiment",
                where=store.images.refs[one.row],
                fix="Restore it, or run the experiment again",
            )
        view = layout.seen(store.record.preprocessing.view(loaded.pixels))
        tokens = store.image(site, one.row, "patches").float()
        active = sae.feature_activations(tokens, [result.selection.feature])[:, 0]
        grid = active.reshape(layout.grid).numpy()
        tile = (_TILE, round(_TILE * view.height / view.width))
        overlay = heat_overlay(view, grid, peak=result.selection.maximum, size=tile)
        shown.append(
            _Shown(
                picture=picture_uri(view.resize(tile)),
                heat=picture_uri(overlay),
                alt=f"{one.predicted}, row {one.row}; the feature fires on "
                f"{int((grid > 0).sum())} of {grid.size} patches",
                before=fixed(one.baseline),
                after=fixed(one.edited),
                predicted=one.predicted
                if one.predicted == one.predicted_edited
                else f"{one.predicted} → {one.predicted_edited}",
            )
        )
    return shown


def _about(result: ExperimentResult) -> list[tuple[str, str]]:
    """How it was done, for whoever wants to do it again."""
    selection, probe = result.selection, result.probe
    searched = plural(selection.n_candidates, "feature")
    chosen = (
        f"{selection.feature}: {selection.rule}, of {searched} searched; average precision "
        f"{fixed(selection.score)} on discovery, {fixed(selection.confirmation_score)} on "
        f"confirmation ({fixed(selection.prevalence)} by chance)"
    )
    task = (
        f"linear probe on the {probe.pool} of the final tokens, C = {probe.regularisation:g}; "
        f"accuracy {fixed(probe.discovery_accuracy)} by cross-validation on discovery, "
        f"{fixed(probe.confirmation_accuracy)} on confirmation ({fixed(probe.chance)} by "
        "naming the largest class)"
    )
    return [
        ("model", f"{result.model.title}, weights {result.model.weights_sha256[:12]}"),
        ("SAE", f"{result.spec['sae']}, weights {result.sae_sha256[:12]}"),
        ("images", f"{result.n_discovery} for discovery, {result.n_confirmation} for confirmation"),
        ("feature", chosen),
        ("task", task),
        ("registered", f"{result.registered_at}, spec {result.spec_sha256[:12]}"),
        ("visae", result.visae_version),
    ]
