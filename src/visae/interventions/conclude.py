"""From an experiment's effects to its result: estimates, verdict, and what limits them."""

from collections.abc import Sequence
from pathlib import Path

import visae
from visae.interventions import analysis
from visae.interventions.analysis import Measured
from visae.interventions.discovery import confirmation_precision
from visae.interventions.effects import Effects
from visae.interventions.result import (
    ClassChange,
    DoseCurve,
    ExperimentResult,
    ProbeResult,
    SelectionResult,
)
from visae.interventions.setup import ExperimentSetup
from visae.interventions.tasks import class_index
from visae.statistics.significance import reach_problem
from visae.storage.records import to_plain

__all__ = ["conclude", "measured_outcome"]

_SHOWN_IMAGES = 8


def conclude(
    setup: ExperimentSetup,
    effects: Effects,
    others: dict[str, Effects],
    curves: list[DoseCurve],
    out: Path,
) -> ExperimentResult:
    """The result of an experiment whose confirmation images have been measured."""
    spec, store = setup.spec, setup.laboratory.store
    classes, measured = setup.probe.classes, measured_outcome(setup, effects)
    controls = analysis.compare_with_controls(measured, setup.families, spec.prediction)
    changes = [analysis.class_change(measured, measured.index, classes)] + [
        analysis.class_change(measured_outcome(setup, e), classes.index(name), classes)
        for name, e in others.items()
    ]
    most, least = analysis.image_outcomes(
        measured, store.images.content_ids, classes, _SHOWN_IMAGES
    )
    return ExperimentResult(
        visae_version=visae.__version__,
        name=spec.name,
        hypothesis=spec.hypothesis,
        spec=to_plain(spec) | {"sae": Path(spec.sae).name, "store": Path(spec.store).name},
        spec_sha256=setup.standing.registration.spec_sha256,
        registered_at=setup.standing.registration.registered_at,
        status="exploratory" if setup.standing.problems else "confirmatory",
        status_reasons=setup.standing.problems,
        model=store.record.identity,
        sae_sha256=setup.record.weights.sha256,
        store_digest=store.digest,
        n_discovery=len(setup.profiles.rows),
        n_confirmation=len(setup.confirmation),
        n_images=len(effects.rows),
        selection=_selection_result(setup),
        probe=_probe_result(setup, effects, others),
        edit_size=analysis.edit_size(effects),
        baseline=measured.mean(measured.baseline),
        edited=measured.mean(measured.edited),
        effect=measured.mean(measured.change),
        controls=tuple(controls),
        verdict=analysis.overall_verdict(controls),
        dose_curves=tuple(curves),
        classes=tuple(changes),
        most_affected=most,
        least_affected=least,
        warnings=_warnings(setup, effects, changes),
        command=f"visae intervene {out.name}/spec.toml --out {out.name}",
    )


def _selection_result(setup: ExperimentSetup) -> SelectionResult:
    selection, profile = setup.selection, setup.profile
    score, prevalence = confirmation_precision(
        setup.laboratory.sae,
        setup.laboratory.store,
        setup.record.provenance,
        selection.feature,
        setup.confirmation,
        setup.spec.outcome.class_name,
    )
    return SelectionResult(
        feature=selection.feature,
        rule=selection.rule,
        n_candidates=selection.n_candidates,
        score=selection.score,
        confirmation_score=score,
        prevalence=prevalence,
        density=profile.density,
        q99=profile.q99,
        maximum=profile.maximum,
    )


def _probe_result(
    setup: ExperimentSetup, effects: Effects, others: dict[str, Effects]
) -> ProbeResult:
    """The probe with its accuracy on the confirmation images used, each class weighing the same."""
    probe = setup.probe
    everything = {setup.spec.outcome.class_name: effects, **others}
    shares = [
        float((e.baseline.argmax(1) == probe.classes.index(name)).double().mean())
        for name, e in everything.items()
    ]
    return ProbeResult(
        pool=probe.pool,
        regularisation=probe.regularisation,
        discovery_accuracy=probe.accuracy,
        confirmation_accuracy=sum(shares) / len(shares),
        chance=probe.chance,
    )


def _warnings(
    setup: ExperimentSetup, effects: Effects, changes: Sequence[ClassChange]
) -> tuple[str, ...]:
    """What limits the result, in sentences."""
    spec, size = setup.spec, analysis.edit_size(effects)
    found = list(setup.standing.warnings)
    for family in setup.families:
        problem = reach_problem(
            family.directions.shape[0],
            alpha=spec.prediction.alpha,
            n_tests=spec.prediction.family_size,
        )
        if problem:
            found.append(f"{family.name.capitalize()}: {problem}")
    if size.share_off_distribution > 0:
        found.append(
            f"{size.share_off_distribution:.0%} of the changed tokens get an activation that was "
            "never observed (beyond twice the maximum, or below zero)"
        )
    if size.n_images_changed == 0:
        found.append("The edit changes no token of any image: the feature does not fire there")
    if setup.probe.accuracy <= setup.probe.chance:
        found.append("The probe is no better than naming the largest class")
    duplicates = setup.laboratory.store.images.duplicates()
    if duplicates:
        found.append(f"{len(duplicates)} images occur more than once in the store")
    return tuple(found)


def measured_outcome(setup: ExperimentSetup, effects: Effects) -> Measured:
    """Effects read as the spec's outcome."""
    groups = [setup.laboratory.store.images.groups[int(row)] for row in effects.rows]
    return Measured(
        effects=effects,
        index=class_index(setup.probe, setup.spec.outcome.class_name),
        measure=setup.spec.outcome.measure,
        groups=groups if any(group is not None for group in groups) else None,
        settings=setup.spec.statistics,
    )
