"""The verbs that find things out: ``evaluate``, ``index`` and ``intervene``."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from visae.cli.output import Screen
from visae.cli.slurm import LongVerb
from visae.errors import ConfigError
from visae.storage.hub_path import is_hub_path

__all__ = ["EvaluateCommand", "IndexCommand", "InterveneCommand"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand(LongVerb):
    """Evaluate SAEs beside their nulls: SAEs, a store, labels → a report card."""

    sae: tuple[str, ...]
    """Folder of the SAE or hf://…; of several, the others measure the first one's stability."""
    store: Path
    """Folder of the store."""
    out: Path | None = None
    """Folder of the report card, instead of the SAE's own."""
    images: str | None = None
    """Where the images are, if they moved since recording."""
    fidelity: bool = True
    """Also run the model with the reconstruction spliced in (needs images and weights)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …"""

    def run(self, screen: Screen) -> None:
        """Evaluate, and print every metric beside its null."""
        from visae.activations.opening import open_store
        from visae.activations.store import ActivationStore
        from visae.evaluation.card import evaluate
        from visae.models.loading import load_model
        from visae.saes.checkpoint import load_sae

        folder = self._card_folder()
        store, model, source = open_store(self.store), None, None
        if self.fidelity:
            if not isinstance(store, ActivationStore):
                what = "saev's folder says neither how to load the model nor where the images are"
                raise ConfigError(what, where=self.store, fix="Add --no-fidelity")
            model = load_model(store.model, device=self.device)
            source = store.source(self.images)
        card = evaluate(
            self.sae[0],
            store,
            model=model,
            source=source,
            others=[load_sae(folder) for folder in self.sae[1:]],
            progress=screen.progress,
        )
        card.write(folder)
        screen.say(card.table())
        screen.say(f"Report card: {folder / 'report_card.json'}")
        beside = folder if is_hub_path(self.sae[0]) else Path(self.sae[0])
        screen.say(
            f"Next: visae index --sae {self.sae[0]} --store {self.store} --side discovery "
            f"--out {beside.parent.parent / 'features' / card.sae}@{self.store.resolve().name}"
        )

    def _card_folder(self) -> Path:
        """Where the report card goes: to the SAE, unless its folder is the hub's."""
        if not self.sae:
            raise ConfigError("No SAE is given", where="--sae", fix="Give one folder or more")
        if self.out is None and is_hub_path(self.sae[0]):
            raise ConfigError(
                "The report card of an SAE of the model hub needs a folder",
                where=self.sae[0],
                fix="Name one with --out",
            )
        return self.out or Path(self.sae[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexCommand(LongVerb):
    """Index an SAE's features: an SAE, a store, the images → a feature index."""

    sae: str
    """Folder of the SAE, or hf://owner/repository/folder."""
    store: Path
    """Folder of the store."""
    out: Path
    """Folder of the index; run again to resume."""
    side: Literal["all", "discovery"] = "all"
    """Images to look at; features chosen from the discovery side can be confirmed on the rest."""
    images: str | None = None
    """Where the images are, if they moved since recording."""

    def run(self, screen: Screen) -> None:
        """Build the index, and say where it is."""
        from visae.activations.store import ActivationStore
        from visae.features.build import build_index
        from visae.features.config import IndexConfig

        build_index(
            self.sae,
            ActivationStore(self.store),
            self.out,
            config=IndexConfig(side=self.side),
            images=self.images,
            progress=screen.progress,
        )
        screen.say(f"Feature index: {self.out}")
        screen.say(f"Next: visae report {self.out} --out {self.out}-report")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterveneCommand(LongVerb):
    """Run a controlled experiment: an experiment spec → effects, controls, intervals, verdict."""

    spec: tyro.conf.Positional[Path]
    """The spec, a TOML file."""
    out: Path
    """Folder of the experiment; run again to resume."""
    images: str | None = None
    """Where the images are, if they moved since recording."""
    weights: Path | None = None
    """Where the model's weights are, if they moved since recording."""
    register_only: bool = False
    """Choose the feature and register the experiment, but leave the confirmation images alone."""
    exploratory: bool = False
    """Run even if the selection saw confirmation images; the result is labelled exploratory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …"""

    def run(self, screen: Screen) -> None:
        """Run the experiment, write its report, and print the verdict."""
        from visae.activations.store import ActivationStore
        from visae.interventions.experiment import run_experiment
        from visae.interventions.setup import register_experiment
        from visae.interventions.spec import read_spec
        from visae.models.loading import choose_device, load_model
        from visae.reports.experiment_page import write_experiment_report

        if self.register_only and self.exploratory:
            raise ConfigError(
                "What is registered is meant to confirm",
                where="--register-only --exploratory",
                fix="Give one of them",
            )
        spec = read_spec(self.spec)
        store = ActivationStore(spec.store)
        model_config = store.model
        if self.weights is not None:
            model_config = dataclasses.replace(model_config, weights=self.weights)
        device = choose_device(self.device)
        model = load_model(model_config, device=self.device)
        source = store.source(self.images)
        if self.register_only:
            registration = register_experiment(
                spec, self.out, model=model, source=source, device=device, progress=screen.progress
            )
            screen.say(f"Registered feature {registration.feature} at {registration.registered_at}")
            screen.say(f"Next: visae intervene {self.spec} --out {self.out}")
            return
        result = run_experiment(
            spec,
            self.out,
            model=model,
            source=source,
            exploratory=self.exploratory,
            device=device,
            progress=screen.progress,
        )
        page = write_experiment_report(self.out, store, source)
        screen.say(f"{result.hypothesis} [{result.status}]")
        screen.say(result.verdict.sentence)
        for warning in (*result.status_reasons, *result.warnings):
            screen.say(f"Note: {warning}.")
        screen.say(f"Report: {page}")
