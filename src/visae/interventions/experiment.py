"""From a spec to a verdict: the verb ``intervene``.

1. Discovery images: encode them, choose the feature, train the task's probe, draw the controls.
2. Registration: the spec's hash, the feature and the confirmation images are written down.
3. Confirmation images: edit, controls, dose curves, specificity; then statistics and verdict.

Source: RIGOR. Main name: ``run_experiment``.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions import analysis
from visae.interventions.conclude import conclude, measured_outcome
from visae.interventions.edits import Edit, scope_tokens
from visae.interventions.effects import Condition, Effects, measure
from visae.interventions.outcomes import write_outcomes
from visae.interventions.result import CurveName, DoseCurve, ExperimentResult
from visae.interventions.setup import ExperimentSetup, prepare_experiment
from visae.interventions.spec import ExperimentSpec
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.storage.locks import exclusive
from visae.storage.records import read_record, write_record

__all__ = ["run_experiment"]

_DOSE_CONTROLS = 5


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
    result = conclude(setup, effects, changes, curves, out)
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
    plans: dict[CurveName, tuple[list[int], list[Edit], tuple[float, ...]]] = {
        "suppression": (
            _evenly(target, doses.n_images),
            [Edit(feature=feature, operation="scale", value=dose) for dose in doses.suppression],
            doses.suppression,
        ),
        "insertion": (
            _evenly(spread, doses.n_images),
            [
                Edit(feature=feature, operation="add", value=dose * setup.profile.q99)
                for dose in doses.insertion
            ],
            doses.insertion,
        ),
    }
    directions = _dose_directions(setup)
    curves = []
    for name, (rows, edits, levels) in plans.items():
        if len(rows) < 2 or len(levels) < 3:
            continue
        effects = [
            _run(setup, rows, edit, directions, partial / f"{name}-{i}", progress)
            for i, edit in enumerate(edits)
        ]
        measured = [measured_outcome(setup, e) for e in effects]
        curves.append(analysis.dose_curve(name, levels, measured))
    return curves


def _dose_directions(setup: ExperimentSetup) -> Tensor:
    """A few of the control directions, for the dose curves."""
    return setup.families[0].directions[:_DOSE_CONTROLS]
