"""An experiment up to its registration: selection, probe and controls from discovery images.

Nothing here has seen a confirmation outcome. Source: RIGOR §5.
"""

import dataclasses
from pathlib import Path

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError
from visae.images.source import ImageSource
from visae.interventions.controls import ControlFamily, control_families
from visae.interventions.discovery import (
    FeatureProfile,
    Profiles,
    Selection,
    profile_features,
    select,
)
from visae.interventions.effects import Laboratory
from visae.interventions.probing import obtain_probe
from visae.interventions.registry import Standing, register
from visae.interventions.result import Registration
from visae.interventions.spec import ExperimentSpec, spec_hash, write_spec
from visae.interventions.tasks import LinearProbe, class_index
from visae.models.protocol import VisionModel
from visae.progress import ProgressCallback, silent
from visae.saes.checkpoint import SAERecord, load_sae, read_sae_record
from visae.saes.matching import require_match
from visae.storage.locks import exclusive

__all__ = ["ExperimentSetup", "prepare_experiment", "register_experiment"]


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
