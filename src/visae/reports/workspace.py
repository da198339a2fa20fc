"""A whole workspace, or a part of one, as static HTML: the verb ``report``.

A workspace's front page leads to its report cards, features and experiments, and shows first what
a stranger wants to see: what some features respond to, and which hypotheses held.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from visae.activations.store import ActivationStore
from visae.errors import ConfigError
from visae.evaluation.card import ReportCard, read_card
from visae.features.index import FeatureIndex
from visae.interventions.result import ExperimentResult
from visae.interventions.spec import read_spec
from visae.progress import ProgressCallback, silent
from visae.reports.card_page import write_card_report
from visae.reports.experiment_page import read_result, write_experiment_report
from visae.reports.figures import overview_sheet
from visae.reports.index_page import chosen_features, write_index_report
from visae.reports.page import write_page
from visae.saes.checkpoint import SAERecord, read_sae_record
from visae.saes.hub import find_sae
from visae.storage.atomic import atomic_path

__all__ = ["write_report"]

_MAX_FEATURES = 150
_SHEET_FEATURES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class _IndexPart:
    """A feature index in the report."""

    index: FeatureIndex
    page: str
    sheet: str
    alt: str
    is_own: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SAEPart:
    """An SAE in the report."""

    name: str
    record: SAERecord
    card: ReportCard | None
    page: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExperimentPart:
    """An experiment in the report."""

    result: ExperimentResult
    page: str


def write_report(
    path: Path, out: Path, *, images: str | None = None, progress: ProgressCallback = silent
) -> Path:
    """Write static HTML about a workspace, feature index, experiment or SAE, and give its page.

    Args:
        path: What to report on; an SAE may be one of the model hub.
        out: Folder of the report.
        images: Where the pictures are, if they moved since they were recorded.
        progress: Told of every feature's page.

    Raises:
        ConfigError: when there is nothing at ``path`` to report on.
        VisaeError: when a part is damaged.
    """
    path, out = find_sae(path).folder, Path(out)
    if (path / "index.json").is_file():
        return write_index_report(FeatureIndex(path), out, progress=progress)
    if (path / "result.json").is_file():
        return _write_experiment(path, out / "index.html", images)
    if (path / "sae.json").is_file():
        return write_card_report(path, out / "index.html")
    return _write_workspace(path, out, images, progress)


def _write_workspace(path: Path, out: Path, images: str | None, progress: ProgressCallback) -> Path:
    saes = [_sae_part(folder, out) for folder in _parts(path / "saes", "sae.json")]
    best = _best_features(saes)
    trained_on = {part.record.provenance.store_digest for part in saes}
    indexes = [
        _index_part(folder, out, best, trained_on, progress)
        for folder in _parts(path / "features", "index.json")
    ]
    experiments = [
        _experiment_part(folder, out, images)
        for folder in _parts(path / "experiments", "result.json")
    ]
    if not (saes or indexes or experiments):
        raise ConfigError(
            "There is nothing here to report on",
            where=path,
            fix="Give a workspace with saes/, features/ or experiments/, or one of their folders",
        )
    stores = [ActivationStore(f) for f in _parts(path / "activations", "store.json")]
    return write_page(
        out / "index.html",
        "workspace.html",
        name=path.resolve().name,
        saes=saes,
        indexes=sorted(indexes, key=lambda part: not part.is_own),
        experiments=experiments,
        stores=stores,
        models=dict.fromkeys(store.record.identity.title for store in stores),
    )


def _parts(folder: Path, name: str) -> Iterator[Path]:
    """Sub-folders that hold a file of some name."""
    if folder.is_dir():
        yield from (found.parent for found in sorted(folder.glob(f"*/{name}")))


def _sae_part(folder: Path, out: Path) -> _SAEPart:
    card, page = None, ""
    if (folder / "report_card.json").is_file():
        card = read_card(folder)
        page = f"saes/{folder.name}.html"
        write_card_report(folder, out / page)
    return _SAEPart(name=folder.name, record=read_sae_record(folder), card=card, page=page)


def _best_features(saes: list[_SAEPart]) -> dict[str, list[int]]:
    """Each class's best feature, in the order of their confirmed precision, by weights hash."""
    best = {}
    for part in saes:
        if part.card is not None:
            ranked = sorted(part.card.classes, key=lambda c: -c.average_precision)
            features = dict.fromkeys(c.feature for c in ranked)
            best[part.record.weights.sha256] = list(features)
    return best


def _index_part(
    folder: Path,
    out: Path,
    best: dict[str, list[int]],
    trained_on: set[str],
    progress: ProgressCallback,
) -> _IndexPart:
    index = FeatureIndex(folder)
    sample = chosen_features(index, _MAX_FEATURES)
    first = best.get(index.record.sae_sha256, [])
    shown = list(dict.fromkeys([*first, *sample]))
    place = f"features/{folder.name}"
    write_index_report(index, out / place, features=shown, progress=progress)
    alive = [feature for feature in shown if index.row(feature).n_images_active > 0]
    sheet = ""
    if alive:
        sheet = f"{place}/overview.png"
        with atomic_path(out / sheet) as temporary:
            overview_sheet(index, alive[:_SHEET_FEATURES]).save(temporary, "PNG", optimize=True)
    return _IndexPart(
        index=index,
        page=f"{place}/index.html",
        sheet=sheet,
        alt=f"{len(alive[:_SHEET_FEATURES])} features, each with the images on which it fires most "
        "and where",
        is_own=index.record.store_digest in trained_on,
    )


def _experiment_part(folder: Path, out: Path, images: str | None) -> _ExperimentPart:
    page = f"experiments/{folder.name}.html"
    _write_experiment(folder, out / page, images)
    return _ExperimentPart(result=read_result(folder), page=page)


def _write_experiment(folder: Path, page: Path, images: str | None) -> Path:
    store = ActivationStore(read_spec(folder / "spec.toml").store)
    return write_experiment_report(folder, store, store.source(images), out=page)
