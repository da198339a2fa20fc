"""From a spec to a verdict: the verb ``intervene``.

1. Discovery images: encode them, choose the feature, train the task's probe, draw the controls.
2. Registration: the spec, the feature and the confirmation images are written down.
3. Confirmation images: edit, controls, dose curves, specificity; then statistics and verdict.

Source: RIGOR. Main name: ``run_experiment``.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions.conclude import conclude
from visae.interventions.controls import ControlFamily, random_directions
from visae.interventions.division import count_units, spread_evenly
from visae.interventions.edits import Edit, scope_tokens
from visae.interventions.effects import Condition, Effects, measure
from visae.interventions.outcomes import MeasuredImages, write_outcomes
from visae.interventions.registry import labels_digest, read_registration
from visae.interventions.result import CurveName, ExperimentResult
from visae.interventions.setup import ExperimentSetup, prepare_experiment
from visae.interventions.spec import ExperimentSpec, spec_hash
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import read_sae_record
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
    device: str | torch.device = "cpu",
    progress: ProgressCallback = silent,
) -> ExperimentResult:
    """Select, register, confirm; write everything to ``out`` and return the result.

    An experiment that is finished with the same spec is read, not run again; an interrupted one
    goes on after the last finished batch of images. The task's probe is kept in ``probe_dir``
    (by default ``out / "probe"``) and used again from there. ``device`` is where the SAE computes:
    best that of the model.

    Raises:
        ExperimentError: when the selection saw confirmation images (unless ``exploratory``), the
            class or feature does not exist, too few images are there to say anything, or ``out``
            holds a finished result that is not of this spec.
        CheckpointError: when the SAE does not belong to the store.
        StoreError: when another process runs this experiment.
    """
    out = Path(out)
    with exclusive(out):
        finished = _finished(spec, out)
        if finished is not None:
            return finished
        setup = prepare_experiment(
            spec,
            out,
            model=model,
            source=source,
            probe_dir=probe_dir,
            exploratory=exploratory,
            device=device,
            progress=progress,
        )
        return _confirm(setup, out, progress)


def _finished(spec: ExperimentSpec, out: Path) -> ExperimentResult | None:
    """The result of an earlier run of the same spec, if there is one.

    Raises:
        ExperimentError: when there is a result of something else, which is never overwritten.
    """
    path = out / "result.json"
    if not path.is_file():
        return None
    result = read_record(ExperimentResult, path, error=ExperimentError)
    registration = read_registration(out)
    store = ActivationStore(spec.store)
    ours = spec_hash(
        spec, sae_sha256=read_sae_record(spec.sae).weights.sha256, store_digest=store.digest
    )
    differences = {
        "spec": result.spec_sha256 != ours,
        "images' labels or groups": registration.labels_digest != labels_digest(store.images),
        "registration": registration.spec_sha256 != result.spec_sha256
        and result.status == "confirmatory",
    }
    if any(differences.values()):
        changed = ", ".join(name for name, differs in differences.items() if differs)
        raise ExperimentError(
            f"This folder holds the finished result of another experiment (changed: {changed})",
            where=out,
            fix="Choose another --out; this result stays as it is",
        )
    return result


class _Curve(NamedTuple):
    """The plan of a dose curve: the same images under a grid of edits."""

    rows: list[int]
    edits: list[Edit]
    scope: str


def _confirm(setup: ExperimentSetup, out: Path, progress: ProgressCallback) -> ExperimentResult:
    """Measure the confirmation images and draw the conclusions."""
    partial = out / "partial" / setup.standing.registration.spec_sha256[:16]
    effects = _run(
        setup, setup.images.target, _edit(setup), setup.families, partial / "target", progress
    )
    others = {
        name: _run(setup, rows, _edit(setup), [], partial / f"class-{index}", progress)
        for index, (name, rows) in enumerate(setup.images.others.items())
    }
    dose_family = _dose_family(setup)
    doses = {
        name: _run_doses(setup, curve, dose_family, partial / name, progress)
        for name, curve in _curves(setup).items()
    }
    result = conclude(setup, effects, others, doses, out)
    measured = [MeasuredImages("target", effects, setup.families)]
    measured += [MeasuredImages("others", e, []) for e in others.values()]
    for name, found in doses.items():
        levels = getattr(setup.spec.doses, name)
        measured += [
            MeasuredImages(f"{name} {dose:g}", e, [dose_family])
            for dose, e in zip(levels, found, strict=True)
        ]
    images = setup.laboratory.store.images
    write_outcomes(out / "outcomes.parquet", images, setup.probe.classes, measured)
    write_record(out / "result.json", result)
    shutil.rmtree(out / "partial", ignore_errors=True)
    return result


def _edit(setup: ExperimentSetup) -> Edit:
    """The spec's edit in raw units."""
    config = setup.spec.edit
    size = setup.profile.unit(config.unit) if config.operation in ("set", "add") else 1.0
    return Edit(
        feature=setup.selection.feature,
        operation=config.operation,
        value=config.value * size,
    )


def _curves(setup: ExperimentSetup) -> dict[CurveName, _Curve]:
    """Suppression where the concept is, insertion where it is not."""
    doses, feature = setup.spec.doses, setup.selection.feature
    scope = setup.spec.edit.scope
    spread = sorted(row for rows in setup.images.others.values() for row in rows)
    curves: dict[CurveName, _Curve] = {
        "suppression": _Curve(
            spread_evenly(setup.images.target, doses.n_images),
            [Edit(feature=feature, operation="scale", value=dose) for dose in doses.suppression],
            scope,
        ),
        "insertion": _Curve(
            spread_evenly(spread, doses.n_images),
            [
                Edit(feature=feature, operation="add", value=dose * setup.profile.q99)
                for dose in doses.insertion
            ],
            "patches" if scope == "active-patches" else scope,
        ),
    }
    images = setup.laboratory.store.images
    return {
        name: curve
        for name, curve in curves.items()
        if curve.edits and count_units(images, curve.rows) > 1
    }


def _run_doses(
    setup: ExperimentSetup,
    curve: _Curve,
    family: ControlFamily,
    partial: Path,
    progress: ProgressCallback,
) -> list[Effects]:
    """The effects at each dose, beside those of a few random directions."""
    return [
        _run(
            setup,
            curve.rows,
            edit,
            [family],
            partial.with_name(f"{partial.name}-{index}"),
            progress,
            scope=curve.scope,
        )
        for index, edit in enumerate(curve.edits)
    ]


def _dose_family(setup: ExperimentSetup) -> ControlFamily:
    """A few random directions for the dose curves: those of the controls, where there are any."""
    family = random_directions(
        setup.spec.controls.n_random or _DOSE_CONTROLS,
        setup.laboratory.sae.d_model,
        seed=setup.spec.statistics.seed,
    )
    return ControlFamily(family.name, family.directions[:_DOSE_CONTROLS], ())


def _run(
    setup: ExperimentSetup,
    rows: Sequence[int],
    edit: Edit,
    families: Sequence[ControlFamily],
    partial: Path,
    progress: ProgressCallback,
    *,
    scope: str | None = None,
) -> Effects:
    lab = setup.laboratory
    scope = scope or setup.spec.edit.scope
    none = torch.zeros(0, lab.sae.d_model)
    condition = Condition(
        edit=edit,
        allowed=scope_tokens(lab.model.layout(lab.site), scope),
        active_only=scope == "active-patches",
        observed_max=setup.profile.maximum,
        directions=torch.cat([none, *(family.directions for family in families)]),
    )
    return measure(
        lab, rows, condition, partial_dir=partial, advance=_teller(partial.name, rows, progress)
    )


def _teller(name: str, rows: Sequence[int], progress: ProgressCallback) -> Callable[[int], None]:
    def tell(done: int) -> None:
        progress(Progress(stage="intervene", done=done, total=len(rows), unit="images", note=name))

    return tell
