"""From a spec to a verdict: the verb ``intervene``.

1. Discovery images: encode them, choose the feature, train the task's probe, draw the controls.
2. Registration: the spec's hash, the feature and the confirmation images are written down.
3. Confirmation images: edit, controls, dose curves, specificity; then statistics and verdict.

Source: RIGOR. Main name: ``run_experiment``.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import visae
from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions import analysis
from visae.interventions.analysis import Measured
from visae.interventions.controls import ControlFamily, control_families
from visae.interventions.discovery import (
    FeatureProfile,
    Profiles,
    Selection,
    confirmation_precision,
    profile_features,
    select,
)
from visae.interventions.edits import Edit, scope_tokens
from visae.interventions.effects import Condition, Effects, Laboratory, measure
from visae.interventions.outcomes import write_outcomes
from visae.interventions.probing import obtain_probe
from visae.interventions.registry import Standing, register
from visae.interventions.result import (
    ClassChange,
    DoseCurve,
    ExperimentResult,
    ProbeResult,
    Registration,
    SelectionResult,
)
from visae.interventions.spec import ExperimentSpec, spec_hash, write_spec
from visae.interventions.tasks import LinearProbe, class_index
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import SAERecord, load_sae, read_sae_record
from visae.saes.matching import require_match
from visae.statistics.significance import reach_problem
from visae.storage.locks import exclusive
from visae.storage.records import read_record, to_plain, write_record

__all__ = [
    "ExperimentSetup",
    "prepare_experiment",
    "register_experiment",
    "run_experiment",
]

_DOSE_CONTROLS = 5
_SHOWN_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class ExperimentSetup:
    """An experiment up to its registration: nothing of it has seen a confirmation outcome."""

    spec: ExperimentSpec
    """The spec."""
    record: SAERecord
    """The SAE's record."""
    laboratory: Laboratory
    """Model, SAE, images and task."""
    profiles: Profiles
    """The features on the discovery images."""
    selection: Selection
    """The chosen feature."""
    profile: FeatureProfile
    """Its profile on the discovery images."""
    probe: LinearProbe
    """The task."""
    families: list[ControlFamily]
    """Control directions."""
    confirmation: list[int]
    """Rows of the confirmation images, of all classes."""
    standing: Standing
    """Registration, and whether the result may count as a confirmation."""


def run_experiment(
    spec: ExperimentSpec,
    out: Path,
    *,
    model: VisionModel,
    source: ImageSource | None = None,
    probe_dir: Path | None = None,
    exploratory: bool = False,
    progress: ProgressCallback = silent,
) -> ExperimentResult:
    """Select, register, confirm; write everything to ``out`` and return the result.

    An experiment that is finished with the same spec is read, not run again; an interrupted one
    goes on after the last finished batch of images. The task's probe is kept in ``probe_dir``
    (by default ``out / "probe"``) and used again from there.

    Raises:
        ExperimentError: when the selection saw confirmation images (unless ``exploratory``), the
            class or feature does not exist, or too few images are there to say anything.
        CheckpointError: when the SAE does not belong to the store.
        StoreError: when another process runs this experiment.
    """
    with exclusive(Path(out)):
        setup = prepare_experiment(
            spec,
            out,
            model=model,
            source=source,
            probe_dir=probe_dir,
            exploratory=exploratory,
            progress=progress,
        )
        finished = _finished(Path(out), setup)
        if finished is not None:
            return finished
        return _confirm(setup, Path(out), progress)


def register_experiment(
    spec: ExperimentSpec,
    out: Path,
    *,
    model: VisionModel,
    source: ImageSource | None = None,
    progress: ProgressCallback = silent,
) -> Registration:
    """Select on the discovery images and register; the confirmation images are left alone.

    Raises:
        ExperimentError: as ``run_experiment``.
    """
    with exclusive(Path(out)):
        setup = prepare_experiment(spec, out, model=model, source=source, progress=progress)
    return setup.standing.registration


def prepare_experiment(
    spec: ExperimentSpec,
    out: Path,
    *,
    model: VisionModel,
    source: ImageSource | None = None,
    probe_dir: Path | None = None,
    exploratory: bool = False,
    progress: ProgressCallback = silent,
) -> ExperimentSetup:
    """Everything before confirmation: selection and probe on discovery images, registration."""
    out = Path(out)
    store = ActivationStore(spec.store)
    record = read_sae_record(spec.sae)
    provenance = record.provenance
    require_match(record, store, provenance.site)
    _require_model(model, store)
    discovery, confirmation = _sides(spec, store)
    sae = load_sae(spec.sae)
    profiles = profile_features(
        sae, store, provenance.site, provenance.tokens, discovery, progress=progress
    )
    selection = select(spec.selection, profiles, [store.images.labels[row] for row in discovery])
    pictures = source or store.source()
    probe = obtain_probe(
        spec.task,
        store,
        model,
        pictures,
        discovery,
        folder=probe_dir or out / "probe",
        progress=progress,
    )
    class_index(probe, spec.outcome.class_name)
    standing = register(
        out,
        spec_sha256=spec_hash(spec, sae_sha256=record.weights.sha256, store_digest=store.digest),
        selection=selection,
        confirmation_ids=[store.images.content_ids[row] for row in confirmation],
        exploratory=exploratory,
    )
    write_spec(spec, out / "spec.toml")
    return ExperimentSetup(
        spec=spec,
        record=record,
        laboratory=Laboratory(store, pictures, model, provenance.site, sae, probe),
        profiles=profiles,
        selection=selection,
        profile=profiles.of(selection.feature),
        probe=probe,
        families=control_families(
            sae, profiles, selection.feature, spec.controls, seed=spec.statistics.seed
        ),
        confirmation=confirmation,
        standing=standing,
    )


def _require_model(model: VisionModel, store: ActivationStore) -> None:
    if not model.identity.same_weights(store.record.identity):
        raise ExperimentError(
            f"The store was recorded from {store.record.identity.title} with other weights than "
            f"{model.identity.title} has now",
            where=store.folder,
            fix="Give the weights the store was recorded from",
        )


def _sides(spec: ExperimentSpec, store: ActivationStore) -> tuple[list[int], list[int]]:
    """Rows of the discovery and of the confirmation images.

    Raises:
        ExperimentError: when a side is empty.
    """
    sides = store.images.sides(
        confirmation_share=spec.split.confirmation_share, salt=spec.split.salt
    )
    discovery = [row for row, side in enumerate(sides) if side == "discovery"]
    confirmation = [row for row, side in enumerate(sides) if side == "confirmation"]
    if not discovery or not confirmation:
        raise ExperimentError(
            f"The split leaves {len(discovery)} discovery and {len(confirmation)} confirmation "
            "images",
            where="split",
            fix="Give more images, or another confirmation_share",
        )
    return discovery, confirmation


def _finished(out: Path, setup: ExperimentSetup) -> ExperimentResult | None:
    """The result of an earlier run of the same spec, if there is one."""
    path = out / "result.json"
    if not path.is_file():
        return None
    result = read_record(ExperimentResult, path, error=ExperimentError)
    same = result.spec_sha256 == setup.standing.registration.spec_sha256
    return result if same else None


def _confirm(setup: ExperimentSetup, out: Path, progress: ProgressCallback) -> ExperimentResult:
    """Measure the confirmation images and draw the conclusions."""
    partial = out / "partial" / setup.standing.registration.spec_sha256[:16]
    target_rows, others = _rows_by_class(setup)
    directions = torch.cat([family.directions for family in setup.families])
    edit = _edit(setup)
    effects = _run(setup, target_rows, edit, directions, partial / "target", progress)
    changes = _other_classes(setup, others, edit, partial, progress)
    curves = _dose_curves(setup, target_rows, others, partial, progress)
    result = _conclude(setup, effects, changes, curves, out)
    write_outcomes(out / "outcomes.parquet", setup.laboratory.store, effects, setup.families)
    write_record(out / "result.json", result)
    shutil.rmtree(out / "partial", ignore_errors=True)
    return result


def _rows_by_class(setup: ExperimentSetup) -> tuple[list[int], dict[str, list[int]]]:
    """Confirmation rows of the target class, and an even sample of those of each other class."""
    labels = setup.laboratory.store.images.labels
    rows: dict[str, list[int]] = {name: [] for name in setup.probe.classes}
    for row in setup.confirmation:
        label = labels[row]
        if label is not None and label in rows:
            rows[label].append(row)
    target = rows.pop(setup.spec.outcome.class_name)
    if len(target) < 2:
        raise ExperimentError(
            f"There are {len(target)} confirmation images of {setup.spec.outcome.class_name}",
            where="outcome.class_name",
            fix="Give more images of this class",
        )
    limit = setup.spec.outcome.n_per_other_class
    return target, {name: _evenly(found, limit) for name, found in rows.items() if found}


def _evenly(rows: Sequence[int], limit: int) -> list[int]:
    step = max(1.0, len(rows) / max(1, limit))
    return [rows[int(i * step)] for i in range(min(limit, len(rows)))]


def _edit(setup: ExperimentSetup) -> Edit:
    """The spec's edit in raw units."""
    config = setup.spec.edit
    size = setup.profile.unit(config.unit) if config.operation in ("set", "add") else 1.0
    return Edit(
        feature=setup.selection.feature,
        operation=config.operation,
        value=config.value * size,
    )


def _run(
    setup: ExperimentSetup,
    rows: Sequence[int],
    edit: Edit,
    directions: Tensor,
    partial: Path,
    progress: ProgressCallback,
) -> Effects:
    lab = setup.laboratory
    layout = lab.model.layout(lab.site)
    condition = Condition(
        edit=edit,
        allowed=scope_tokens(layout, setup.spec.edit.scope),
        active_only=setup.spec.edit.scope == "active-patches",
        observed_max=setup.profile.maximum,
        directions=directions,
    )
    return measure(
        lab, rows, condition, partial_dir=partial, advance=_teller(partial.name, rows, progress)
    )


def _teller(name: str, rows: Sequence[int], progress: ProgressCallback) -> Callable[[int], None]:
    def tell(done: int) -> None:
        progress(Progress(stage="intervene", done=done, total=len(rows), unit="images", note=name))

    return tell


def _measured(setup: ExperimentSetup, effects: Effects) -> Measured:
    groups = [setup.laboratory.store.images.groups[int(row)] for row in effects.rows]
    return Measured(
        effects=effects,
        index=class_index(setup.probe, setup.spec.outcome.class_name),
        measure=setup.spec.outcome.measure,
        groups=groups if any(group is not None for group in groups) else None,
        settings=setup.spec.statistics,
    )


def _other_classes(
    setup: ExperimentSetup,
    others: dict[str, list[int]],
    edit: Edit,
    partial: Path,
    progress: ProgressCallback,
) -> dict[str, Effects]:
    """The edit, without controls, on images of every other class."""
    none = torch.zeros(0, setup.laboratory.sae.d_model)
    return {
        name: _run(setup, rows, edit, none, partial / f"class-{index}", progress)
        for index, (name, rows) in enumerate(others.items())
        if len(rows) > 1
    }


def _dose_curves(
    setup: ExperimentSetup,
    target: list[int],
    others: dict[str, list[int]],
    partial: Path,
    progress: ProgressCallback,
) -> list[DoseCurve]:
    """Suppression where the concept is, insertion where it is not, each beside random pushes."""
    doses, feature = setup.spec.doses, setup.selection.feature
    spread = sorted(row for rows in others.values() for row in rows)
    plans = {
        "suppression": (
            _evenly(target, doses.n_images),
            doses.suppression,
            lambda dose: Edit(feature=feature, operation="scale", value=dose),
        ),
        "insertion": (
            _evenly(spread, doses.n_images),
            doses.insertion,
            lambda dose: Edit(feature=feature, operation="add", value=dose * setup.profile.q99),
        ),
    }
    directions = _dose_directions(setup)
    curves = []
    for name, (rows, levels, make) in plans.items():
        if len(rows) < 2 or len(levels) < 3:
            continue
        effects = [
            _run(setup, rows, make(dose), directions, partial / f"{name}-{i}", progress)
            for i, dose in enumerate(levels)
        ]
        measured = [_measured(setup, e) for e in effects]
        curves.append(analysis.dose_curve(name, levels, measured))
    return curves


def _dose_directions(setup: ExperimentSetup) -> Tensor:
    """A few of the control directions, for the dose curves."""
    return setup.families[0].directions[:_DOSE_CONTROLS]


def _conclude(
    setup: ExperimentSetup,
    effects: Effects,
    others: dict[str, Effects],
    curves: list[DoseCurve],
    out: Path,
) -> ExperimentResult:
    spec, store = setup.spec, setup.laboratory.store
    classes, measured = setup.probe.classes, _measured(setup, effects)
    controls = analysis.compare_with_controls(measured, setup.families, spec.prediction)
    changes = [analysis.class_change(measured, measured.index, classes)] + [
        analysis.class_change(_measured(setup, e), classes.index(name), classes)
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
