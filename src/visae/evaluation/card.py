"""The report card of an SAE: the verb ``evaluate``.

One pass over the store encodes every token; two more do the same for dictionaries of the same
size and L0 that have learned nothing. Every metric is printed beside what those reach.

Main names: ``evaluate``, ``ReportCard``, ``read_card``.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from rich.table import Table
from torch import Tensor

import visae
from visae.activations.stored import StoredTokens
from visae.errors import CheckpointError, ConfigError
from visae.evaluation.baselines import baseline
from visae.evaluation.class_scores import ClassProbe, LabelledImages, class_probe, label_images
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.fidelity import ImageScore, splice_in
from visae.evaluation.metrics import Measurement, measure
from visae.evaluation.rows import MetricRow
from visae.evaluation.sections import (
    class_rows,
    reconstruction_rows,
    sparsity_rows,
    spliced_rows,
    stability_rows,
)
from visae.evaluation.table import card_table
from visae.evaluation.tokens import EvaluatedTokens
from visae.images.source import ImageSource
from visae.models.config import ModelIdentity
from visae.models.layout import TokenPolicy
from visae.models.protocol import VisionModel
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import SAERecord, load_sae, read_sae_record
from visae.saes.hub import find_sae
from visae.saes.matching import require_match
from visae.saes.sae import SAE
from visae.statistics.resampling import Resampling, plan_resampling
from visae.storage.records import read_record, write_record

__all__ = ["ClassScore", "ReportCard", "evaluate", "read_card"]

_FILE = "report_card.json"
_OWN = "sae"  # what stands first, before the baselines
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The best feature of one class."""

    name: str
    """The class."""
    feature: int
    """The feature with the highest average precision on the discovery images."""
    discovery_precision: float
    """That average precision, which is too high because it was chosen by it."""
    average_precision: float
    """Average precision on the confirmation images."""
    top_precision: float
    """Precision of the top on the confirmation images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportCard:
    """Every metric of one SAE beside its nulls; the file ``report_card.json``."""

    kind: str = "report card"
    """Always ``report card``."""
    format: int = 1
    """Version of this format."""
    visae_version: str
    """Version of visae that wrote it."""
    sae: str
    """Name of the SAE's folder."""
    sae_sha256: str
    """Hash of its weights file."""
    control: str
    """``none``, or which kind of control the SAE is."""
    n_features: int
    """Number of features."""
    model: ModelIdentity
    """The vision model."""
    site: str
    """The site."""
    tokens: TokenPolicy
    """Which tokens were evaluated."""
    store_digest: str
    """Hash of the activation store."""
    n_images: int
    """Images evaluated."""
    n_tokens: int
    """Tokens evaluated."""
    config: EvaluateConfig
    """Settings of the evaluation."""
    rows: tuple[MetricRow, ...]
    """The metrics."""
    classes: tuple[ClassScore, ...]
    """The best feature of each class; none without labels."""
    l0_quantiles: dict[str, int]
    """Active features of a token, at some quantiles of the tokens."""
    density_quantiles: dict[str, float]
    """Share of tokens at which a feature is active, at some quantiles of the features."""
    grid: tuple[int, int]
    """Rows and columns of the patch grid."""
    nmse_by_position: tuple[float | None, ...]
    """NMSE at each evaluated token position, row by row; None where activations do not vary."""

    def row(self, name: str) -> MetricRow:
        """One metric.

        Raises:
            ConfigError: when there is no metric of that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise ConfigError(f"There is no metric {name}", where=self.sae, fix=f"Use one of: {known}")

    def write(self, folder: Path) -> Path:
        """Write ``report_card.json`` into a folder, and say where it is."""
        path = Path(folder) / _FILE
        write_record(path, self)
        return path

    def table(self) -> Table:
        """The metrics as a table for the terminal."""
        title = f"{self.sae} · {self.model.title} · {self.site} · {self.n_images} images"
        return card_table(title, self.rows)


def read_card(folder: Path) -> ReportCard:
    """The report card in a folder.

    Raises:
        CheckpointError: when there is none, or it is damaged or newer.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise CheckpointError(
            "There is no report card here",
            where=folder,
            fix="Make one with: visae evaluate --sae DIR --store DIR",
        )
    return read_record(ReportCard, path, error=CheckpointError)


def evaluate(
    sae: str | Path,
    store: StoredTokens,
    *,
    config: EvaluateConfig | None = None,
    model: VisionModel | None = None,
    source: ImageSource | None = None,
    score: ImageScore | None = None,
    others: Sequence[SAE] = (),
    progress: ProgressCallback = silent,
) -> ReportCard:
    """Measure an SAE on all images of a store, beside its nulls.

    Metrics that lack what they need (labels, another SAE, the model) say so in place of a number.

    Args:
        sae: Folder of the SAE, or its place on the model hub (``hf://…``).
        store: Activations of its model, at its site.
        config: Settings, or the defaults.
        model: The model that was recorded, to splice reconstructions in.
        source: The recorded images in the store's order (``store.source()``), for the same.
        score: A task, for the score that is kept when reconstructions are spliced in.
        others: SAEs of the same site, for example of other seeds, for stability.
        progress: Hears how many images are done.

    Raises:
        CheckpointError: when the SAE cannot be loaded or was not made for such a store.
        ModelError: when ``model`` is not the one that was recorded.
    """
    settings = config or EvaluateConfig()
    found = find_sae(sae)
    record = read_sae_record(found.folder)
    site = require_match(record, store)
    tokens = EvaluatedTokens(store, site, record.provenance.tokens)
    labelled = label_images(store.images, settings)
    saes, measured = _measure_all(load_sae(found.folder), tokens, labelled, settings, progress)
    probes = {
        name: class_probe(each.image_codes, labelled)
        for name, each in measured.items()
        if not labelled.problem
    }
    outcomes = None
    if model is not None and source is not None:
        outcomes = splice_in(
            saes,
            tokens,
            model,
            source,
            score=score,
            config=settings,
            on_images=lambda done: progress(_spliced(done, tokens, settings)),
        )
    rows = (
        *reconstruction_rows(measured, _resampling(tokens, settings)),
        *sparsity_rows(measured),
        *class_rows(probes, labelled, settings),
        *stability_rows(saes[_OWN], others, tokens, settings),
        *spliced_rows(outcomes, tokens, settings),
    )
    card = _card(record, tokens, measured[_OWN], settings)
    return dataclasses.replace(
        card,
        sae=found.name,
        rows=rows,
        classes=_class_scores(probes[_OWN], settings) if probes else (),
    )


def _measure_all(
    sae: SAE,
    tokens: EvaluatedTokens,
    labelled: LabelledImages,
    config: EvaluateConfig,
    progress: ProgressCallback,
) -> tuple[dict[str, SAE], dict[str, Measurement]]:
    """The SAE and its baselines, by name, each measured in one pass."""
    images = torch.zeros(tokens.n_images, dtype=torch.bool)
    images[torch.from_numpy(labelled.rows)] = True
    total = tokens.n_images * (1 + len(config.baselines))

    def measured_as(name: str, dictionary: SAE, done: int) -> Measurement:
        def tell(n_images: int) -> None:
            progress(
                Progress(
                    stage="evaluate", done=done + n_images, total=total, unit="images", note=name
                )
            )

        return measure(dictionary, tokens, images=images, on_images=tell)

    saes = {_OWN: sae}
    results = {_OWN: measured_as(_OWN, sae, 0)}
    for number, kind in enumerate(config.baselines, start=1):
        name = kind.replace("-", " ")
        saes[name] = baseline(
            kind,
            sae,
            tokens,
            l0=results[_OWN].mean_l0,
            n_tokens=config.n_sampled_tokens,
            seed=config.seed,
        )
        results[name] = measured_as(name, saes[name], number * tokens.n_images)
    return saes, results


def _spliced(done: int, tokens: EvaluatedTokens, config: EvaluateConfig) -> Progress:
    total = min(tokens.n_images, config.n_spliced_images)
    return Progress(stage="splice in", done=done, total=total, unit="images")


def _resampling(tokens: EvaluatedTokens, config: EvaluateConfig) -> Resampling:
    """How all images of the store are resampled."""
    return plan_resampling(
        tokens.n_images,
        groups=tokens.store.images.groups,
        level=config.level,
        n_resamples=config.n_resamples,
        seed=config.seed,
    )


def _class_scores(probe: ClassProbe, config: EvaluateConfig) -> tuple[ClassScore, ...]:
    labelled = probe.labelled
    chosen = probe.choose(labelled.classes[~labelled.confirms])
    confirmation = labelled.classes[labelled.confirms]
    scores = probe.score(
        chosen.features, confirmation, np.ones((1, len(confirmation))), n_top=config.n_top
    )
    return tuple(
        ClassScore(
            name=labelled.names[number],
            feature=int(chosen.features[place]),
            discovery_precision=float(chosen.precision[place]),
            average_precision=float(scores[0, place, 0]),
            top_precision=float(scores[1, place, 0]),
        )
        for place, number in enumerate(labelled.scored)
    )


def _card(
    record: SAERecord, tokens: EvaluatedTokens, measured: Measurement, config: EvaluateConfig
) -> ReportCard:
    """What a card says of the SAE and the data; its rows come after."""
    made, density = record.provenance, measured.density
    return ReportCard(
        visae_version=visae.__version__,
        sae="",
        sae_sha256=record.weights.sha256,
        control=made.control,
        n_features=record.n_features,
        model=made.model,
        site=tokens.site,
        tokens=tokens.policy,
        store_digest=tokens.store.digest,
        n_images=tokens.n_images,
        n_tokens=measured.n_tokens,
        config=config,
        rows=(),
        classes=(),
        l0_quantiles={f"{q:g}": measured.l0_quantile(q) for q in _QUANTILES},
        density_quantiles={f"{q:g}": float(density.quantile(q)) for q in _QUANTILES},
        grid=tokens.store.site(tokens.site).layout.grid,
        nmse_by_position=_finite(measured.nmse_by_position),
    )


def _finite(values: Float64[Tensor, " position"]) -> tuple[float | None, ...]:
    return tuple(value if np.isfinite(value) else None for value in values.tolist())
