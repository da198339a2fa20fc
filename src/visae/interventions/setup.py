"""An experiment up to its registration: selection, probe and controls from discovery images.

Nothing here has seen a confirmation outcome. Source: RIGOR §5.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError, nearest_names
from visae.images.catalog import ImageTable
from visae.images.source import ImageSource
from visae.interventions.controls import ControlFamily, control_families
from visae.interventions.discovery import (
    FeatureProfile,
    Profiles,
    Selection,
    profile_features,
    select,
)
from visae.interventions.edits import scope_tokens
from visae.interventions.effects import Laboratory
from visae.interventions.probing import obtain_probe, probe_classes
from visae.interventions.registry import Standing, register
from visae.interventions.result import Registration
from visae.interventions.spec import ExperimentSpec, spec_settings, write_spec
from visae.interventions.tasks import FEWEST_IMAGES, LinearProbe
from visae.models.protocol import VisionModel
from visae.progress import ProgressCallback, silent
from visae.saes.checkpoint import SAERecord, load_sae, read_sae_record
from visae.saes.matching import require_match
from visae.storage.locks import exclusive

__all__ = [
    "ExperimentSetup",
    "evenly",
    "image_units",
    "prepare_experiment",
    "register_experiment",
]


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
    target: list[int]
    """Those of the target class."""
    others: dict[str, list[int]]
    """An even sample of those of each other class."""
    standing: Standing
    """Registration, and whether the result may count as a confirmation."""


def register_experiment(
    spec: ExperimentSpec,
    out: Path,
    *,
    model: VisionModel,
    source: ImageSource | None = None,
    probe_dir: Path | None = None,
    device: str | torch.device = "cpu",
    progress: ProgressCallback = silent,
) -> Registration:
    """Select on the discovery images and register; the confirmation images are left alone.

    Raises:
        ExperimentError: as ``run_experiment``.
    """
    with exclusive(Path(out)):
        setup = prepare_experiment(
            spec,
            out,
            model=model,
            source=source,
            probe_dir=probe_dir,
            device=device,
            progress=progress,
        )
    return setup.standing.registration


def prepare_experiment(
    spec: ExperimentSpec,
    out: Path,
    *,
    model: VisionModel,
    source: ImageSource | None = None,
    probe_dir: Path | None = None,
    exploratory: bool = False,
    device: str | torch.device = "cpu",
    progress: ProgressCallback = silent,
) -> ExperimentSetup:
    """Everything before confirmation: selection and probe on discovery images, registration.

    What makes the experiment impossible is found before it is registered.

    Raises:
        ExperimentError: as ``run_experiment``.
    """
    out = Path(out)
    store = ActivationStore(spec.store)
    record = read_sae_record(spec.sae)
    provenance = record.provenance
    require_match(record, store, provenance.site)
    _require_model(model, store)
    images = store.images
    discovery, confirmation = _sides(spec, store)
    _require_class(spec, store, discovery)
    target, others = _rows_by_class(spec, images, confirmation, probe_classes(store, discovery))
    sae = load_sae(spec.sae, device=device)
    profiles = profile_features(
        sae, store, provenance.site, provenance.tokens, discovery, progress=progress
    )
    selection = select(
        spec.selection,
        profiles,
        [images.labels[row] for row in discovery],
        sae_sha256=record.weights.sha256,
    )
    families = control_families(
        sae, profiles, selection.feature, spec.controls, seed=spec.statistics.seed
    )
    scope_tokens(model.layout(provenance.site), spec.edit.scope)
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
    standing = register(
        out,
        settings=spec_settings(spec, sae_sha256=record.weights.sha256, store_digest=store.digest),
        selection=selection,
        images=images,
        confirmation=confirmation,
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
        families=families,
        confirmation=confirmation,
        target=target,
        others=others,
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


def _require_class(spec: ExperimentSpec, store: ActivationStore, discovery: Sequence[int]) -> None:
    """Refuse a target class that the task cannot learn."""
    name, known = spec.outcome.class_name, probe_classes(store, discovery)
    if name in known:
        return
    n_images = sum(store.images.labels[row] == name for row in discovery)
    if n_images:
        raise ExperimentError(
            f"Class {name} has {n_images} discovery images, and the probe needs {FEWEST_IMAGES}",
            where="outcome.class_name",
            fix="Give more images of this class",
        )
    raise ExperimentError(
        f"No discovery image has the label {name}",
        where="outcome.class_name",
        fix=f"Use one of: {nearest_names(name, known)}",
    )


def _rows_by_class(
    spec: ExperimentSpec, images: ImageTable, confirmation: Sequence[int], classes: Sequence[str]
) -> tuple[list[int], dict[str, list[int]]]:
    """Confirmation rows of the target class, and an even sample of those of each other class.

    Raises:
        ExperimentError: when the target class has fewer than two independent images.
    """
    rows: dict[str, list[int]] = {name: [] for name in classes}
    for row in confirmation:
        label = images.labels[row]
        if label is not None and label in rows:
            rows[label].append(row)
    target = rows.pop(spec.outcome.class_name)
    n_units = len(set(image_units(images, target)))
    if n_units < 2:
        raise ExperimentError(
            f"There are {len(target)} confirmation images of {spec.outcome.class_name}, of which "
            f"{n_units} are independent",
            where="outcome.class_name",
            fix="Give more images of this class, from different groups if they have groups",
        )
    limit = spec.outcome.n_per_other_class
    others = {name: evenly(found, limit) for name, found in rows.items()}
    return target, {n: o for n, o in others.items() if len(set(image_units(images, o))) > 1}


def image_units(images: ImageTable, rows: Sequence[int]) -> list[str]:
    """What each image counts as: its group, or its content, for a copy is no second observation."""
    groups, contents = images.groups, images.content_ids
    return [
        f"image {contents[row]}" if groups[row] is None else f"group {groups[row]}" for row in rows
    ]


def evenly(rows: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the rows, spread evenly over them."""
    step = max(1.0, len(rows) / max(1, limit))
    return [rows[int(i * step)] for i in range(min(limit, len(rows)))]
