"""An experiment up to its registration: selection, probe and controls from discovery images.

Nothing here has seen a confirmation outcome. Source: RIGOR §5.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

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
from visae.interventions.division import DividedImages, divide_images
from visae.interventions.edits import scope_tokens
from visae.interventions.effects import Laboratory
from visae.interventions.probing import obtain_probe
from visae.interventions.registry import Standing, register
from visae.interventions.result import Registration
from visae.interventions.spec import ExperimentSpec, spec_settings, write_spec
from visae.interventions.tasks import LinearProbe
from visae.models.protocol import VisionModel
from visae.progress import ProgressCallback, silent
from visae.saes.checkpoint import SAERecord, load_sae, read_sae_record
from visae.saes.hub import find_sae
from visae.saes.matching import require_match
from visae.saes.sae import SAE
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
    images: DividedImages
    """Which images are for what."""
    selection: Selection
    """The chosen feature."""
    profile: FeatureProfile
    """Its profile on the discovery images."""
    probe: LinearProbe
    """The task."""
    families: list[ControlFamily]
    """Control directions."""
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
    sae_folder = find_sae(spec.sae).folder
    store, record = ActivationStore(spec.store), read_sae_record(sae_folder)
    site = require_match(record, store)
    _require_model(model, store)
    scope_tokens(model.layout(site), spec.edit.scope)
    images = divide_images(store.images, spec.split, spec.outcome)
    sae = load_sae(sae_folder, device=device)
    profiles, selection = _choose(spec, record, store, sae, images.discovery, progress)
    families = control_families(
        sae, profiles, selection.feature, spec.controls, seed=spec.statistics.seed
    )
    pictures = source or store.source()
    probe = obtain_probe(
        spec.task,
        store,
        model,
        pictures,
        images.discovery,
        folder=probe_dir or Path(out) / "probe",
        progress=progress,
    )
    standing = register(
        Path(out),
        settings=spec_settings(spec, sae_sha256=record.weights.sha256, store_digest=store.digest),
        selection=selection,
        images=store.images,
        confirmation=images.confirmation,
        exploratory=exploratory,
    )
    write_spec(spec, Path(out) / "spec.toml")
    return ExperimentSetup(
        spec=spec,
        record=record,
        laboratory=Laboratory(store, pictures, model, site, sae, probe),
        images=images,
        selection=selection,
        profile=profiles.of(selection.feature),
        probe=probe,
        families=families,
        standing=standing,
    )


def _choose(
    spec: ExperimentSpec,
    record: SAERecord,
    store: ActivationStore,
    sae: SAE,
    discovery: Sequence[int],
    progress: ProgressCallback,
) -> tuple[Profiles, Selection]:
    """What the features do on the discovery images, and the one that the spec's rule chooses."""
    made = record.provenance
    profiles = profile_features(sae, store, made.site, made.tokens, discovery, progress=progress)
    labels = [store.images.labels[row] for row in profiles.rows]
    return profiles, select(spec.selection, profiles, labels, sae_sha256=record.weights.sha256)


def _require_model(model: VisionModel, store: ActivationStore) -> None:
    if not model.identity.same_weights(store.record.identity):
        raise ExperimentError(
            f"The store was recorded from {store.record.identity.title} with other weights than "
            f"{model.identity.title} has now",
            where=store.folder,
            fix="Give the weights the store was recorded from",
        )
