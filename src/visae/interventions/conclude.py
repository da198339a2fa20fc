"""From an experiment's effects to its result: estimates, verdict, and what limits them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import visae
from visae.interventions import analysis
from visae.interventions.analysis import Measured
from visae.interventions.discovery import confirmation_precision
from visae.interventions.division import image_units
from visae.interventions.effects import Effects
from visae.interventions.result import (
    CurveName,
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
    doses: dict[CurveName, list[Effects]],
    out: Path,
) -> ExperimentResult:
    """The result of an experiment whose confirmation images have been measured.

    Args:
        setup: What was registered.
        effects: Of the edit and its controls, on the images of the target class.
        others: Of the edit, on images of each other class.
        doses: Of each dose of each curve.
        out: Folder of the experiment.
    """
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
        spec=_spec_without_paths(setup),
        spec_sha256=setup.standing.registration.spec_sha256,
        registered_at=setup.standing.registration.registered_at,
        status="exploratory" if setup.standing.problems else "confirmatory",
        status_reasons=setup.standing.problems,
        model=store.record.identity,
        sae_sha256=setup.record.weights.sha256,
        store_digest=store.digest,
        n_discovery=len(setup.images.discovery),
        n_confirmation=len(setup.images.confirmation),
        n_images=len(effects.rows),
        selection=_selection_result(setup),
        probe=_probe_result(setup, effects, others),
        edit_size=analysis.edit_size(effects),
        baseline=measured.mean(measured.baseline),
        edited=measured.mean(measured.edited),
        effect=measured.mean(measured.change),
        controls=tuple(controls),
        verdict=analysis.overall_verdict(controls),
        dose_curves=tuple(
            analysis.dose_curve(
                name, getattr(spec.doses, name), [measured_outcome(setup, e) for e in found]
            )
            for name, found in doses.items()
        ),
        classes=tuple(changes),
        most_affected=most,
        least_affected=least,
        warnings=tuple(_warnings(setup, effects, doses)),
        command=_command(setup, out),
    )


def _spec_without_paths(setup: ExperimentSetup) -> dict[str, Any]:
    """The spec as plain data; no path of this machine, only the last name of each."""
    plain: dict[str, Any] = to_plain(setup.spec)
    for table, key in ((plain, "sae"), (plain, "store"), (plain["selection"], "chosen_from")):
        if table.get(key) is not None:
            table[key] = Path(table[key]).name
    return plain


def _command(setup: ExperimentSetup, out: Path) -> str:
    """What to type beside the experiment's folder to have it all again."""
    name = out.resolve().name
    flag = " --exploratory" if setup.standing.forced else ""
    return f"visae intervene {name}/spec.toml --out {name}-again{flag}"


def _selection_result(setup: ExperimentSetup) -> SelectionResult:
    selection, profile = setup.selection, setup.profile
    score, prevalence = confirmation_precision(
        setup.laboratory.sae,
        setup.laboratory.store,
        setup.record.provenance,
        selection.feature,
        setup.images.confirmation,
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
        confirmation_chance=1 / len(shares),
    )


def _warnings(
    setup: ExperimentSetup, effects: Effects, doses: dict[CurveName, list[Effects]]
) -> Iterator[str]:
    """What limits the result, in sentences."""
    yield from setup.standing.warnings
    yield from _reach_warnings(setup)
    yield from _edit_warnings(setup, effects)
    yield from _class_warnings(setup, doses)


def _reach_warnings(setup: ExperimentSetup) -> Iterator[str]:
    spec = setup.spec
    draws = {f.name.capitalize(): f.directions.shape[0] for f in setup.families}
    draws["Permutations"] = spec.statistics.n_permutations
    for name, n_draws in draws.items():
        problem = reach_problem(
            n_draws, alpha=spec.prediction.alpha, n_tests=spec.prediction.family_size
        )
        if problem:
            yield f"{name}: {problem}"


def _edit_warnings(setup: ExperimentSetup, effects: Effects) -> Iterator[str]:
    size = analysis.edit_size(effects)
    if size.share_off_distribution > 0:
        yield (
            f"{size.share_off_distribution:.0%} of the changed tokens get an activation that was "
            "never observed (beyond twice the maximum, or below zero)"
        )
    if size.n_images_changed == 0:
        yield "The edit changes no token of any image: the feature does not fire there"
    scope, seen = setup.spec.edit.scope, setup.record.provenance.tokens
    if "all" not in (scope, seen) and (scope == "special") != (seen == "special"):
        yield f"The SAE has learned from {seen} tokens, and the edit is on {scope}"
    elif scope == "all" != seen:
        yield f"The SAE has learned from {seen} tokens, and the edit is on all"


def _class_warnings(setup: ExperimentSetup, doses: dict[CurveName, list[Effects]]) -> Iterator[str]:
    images, classes = setup.laboratory.store.images, setup.probe.classes
    if setup.probe.accuracy <= setup.probe.chance:
        yield "The probe is no better than naming the largest class"
    if small := [name for name in images.classes if name not in classes]:
        yield f"Classes with too few discovery images for the probe: {', '.join(small)}"
    unseen = set(classes) - set(setup.images.others) - {setup.spec.outcome.class_name}
    if unseen and setup.spec.outcome.n_per_other_class:
        names = ", ".join(sorted(unseen))
        yield f"Classes with too few confirmation images to show specificity: {names}"
    for name in ("suppression", "insertion"):
        if getattr(setup.spec.doses, name) and name not in doses:
            yield f"There are too few images for the {name} curve"
    if duplicates := images.duplicates():
        yield f"{len(duplicates)} images occur more than once in the store; copies count as one"


def measured_outcome(setup: ExperimentSetup, effects: Effects) -> Measured:
    """Effects read as the spec's outcome."""
    units = image_units(setup.laboratory.store.images, effects.rows.tolist())
    return Measured(
        effects=effects,
        index=class_index(setup.probe, setup.spec.outcome.class_name),
        measure=setup.spec.outcome.measure,
        groups=units if len(set(units)) < len(units) else None,
        settings=setup.spec.statistics,
    )
