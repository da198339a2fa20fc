"""A feature index as a folder of static HTML: a table of features, and a page for each.

``index.html`` opens from disk. ``features/`` holds a page a feature, ``images/`` what the model saw
of every example. Heat maps are inside the pages, a pixel a patch.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from visae.errors import FeatureIndexError
from visae.features.index import FeatureIndex
from visae.features.record import BANDS
from visae.features.table import FeatureRow
from visae.features.thumbnails import thumbnail_bytes
from visae.progress import Progress, ProgressCallback, silent
from visae.reports.colours import hex_colours
from visae.reports.figures import log_heights
from visae.reports.page import write_page
from visae.reports.pairs import Pair, example_pairs
from visae.reports.wording import BAND_TITLES, FLAG_MEANINGS, feature_facts, number
from visae.storage.atomic import write_bytes

__all__ = ["chosen_features", "write_index_report"]

_N_MINI = 6
_THREADS = 4
_COLUMNS = (
    ("feature", "feature"),
    ("density", "density"),
    ("images", "images"),
    ("max", "max"),
    ("lift", "best class, lift"),
    ("entropy", "entropy (bits)"),
    ("position", "position R²"),
    ("flags", "flags"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Band:
    """One band of a feature's page."""

    title: str
    meaning: str
    pairs: list[Pair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
    """One feature's line of the table."""

    row: FeatureRow
    name: str
    pairs: list[Pair]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bar:
    """One bar of a histogram."""

    height: float
    colour: str


def write_index_report(
    index: FeatureIndex,
    out: Path,
    *,
    features: Sequence[int] | None = None,
    max_features: int = 400,
    progress: ProgressCallback = silent,
) -> Path:
    """Write the report of an index into folder ``out``, and give the page to open.

    Args:
        index: The index.
        out: Folder of the report; pages that are there already are overwritten.
        features: Which features to show, in this order; without it, those of ``chosen_features``.
        max_features: How many to show at most where none are given.
        progress: Told of every page.

    Raises:
        FeatureIndexError: when there is no such feature, or the index is damaged.
        StoreError: when the disk is full, read-only or not permitted.
    """
    shown = chosen_features(index, max_features) if features is None else list(features)
    for feature in shown:
        _check_exists(index, feature)
    wanted: set[str] = set()
    lines: list[_Line] = []
    for place, feature in enumerate(shown):
        bands = _bands(index, feature)
        wanted.update(pair.content_id for band in bands for pair in band.pairs)
        _write_feature(index, Path(out), shown, place, bands)
        mini = bands[0].pairs[:_N_MINI] if bands else []
        lines.append(_Line(row=index.row(feature), name=index.name(feature), pairs=mini))
        done = Progress(stage="report", done=place + 1, total=len(shown), unit="features")
        progress(done)
    _copy_images(index, Path(out), wanted)
    return _write_table(index, Path(out), lines, is_sample=features is None)


def chosen_features(index: FeatureIndex, n: int) -> list[int]:
    """The features that fire at all; if they are more than ``n``, ``n`` of them at random.

    The draw is the same every time. It is no choice of the best ones: it shows what the SAE's
    features are like.
    """
    alive = np.flatnonzero(index.features.column("n_tokens_active") > 0)
    if len(alive) > n:
        alive = np.sort(np.random.default_rng(0).choice(alive, n, replace=False))
    return [int(feature) for feature in alive]


def _check_exists(index: FeatureIndex, feature: int) -> None:
    if not 0 <= feature < index.n_features:
        raise FeatureIndexError(
            f"There is no feature {feature}",
            where=index.folder,
            fix=f"Give numbers from 0 to {index.n_features - 1}",
        )


def _bands(index: FeatureIndex, feature: int) -> list[_Band]:
    """The bands that hold an example, strongest first."""
    peak = index.row(feature).max
    examples = index.examples(feature)
    return [
        _Band(
            title=BAND_TITLES[band][0],
            meaning=" ".join(BAND_TITLES[band][1]),
            pairs=example_pairs(index, feature, examples[band], peak=peak),
        )
        for band in BANDS
        if examples[band]
    ]


def _copy_images(index: FeatureIndex, out: Path, content_ids: Iterable[str]) -> None:
    def copy(content_id: str) -> None:
        data = thumbnail_bytes(index.folder, content_id)
        write_bytes(out / "images" / f"{content_id}.webp", data)

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(copy, sorted(content_ids)))


def _write_feature(
    index: FeatureIndex, out: Path, shown: Sequence[int], place: int, bands: Sequence[_Band]
) -> None:
    feature = shown[place]
    row = index.row(feature)
    colours = hex_colours(len(row.histogram))
    heights = log_heights(row.histogram)
    write_page(
        out / "features" / f"{feature}.html",
        "feature.html",
        **_about(index),
        name=index.name(feature),
        row=row,
        facts=[*feature_facts(row, index.n_images), *_more_facts(row)],
        flags=[(flag, FLAG_MEANINGS[flag]) for flag in row.flags],
        bars=[_Bar(height=h, colour=c) for h, c in zip(heights, colours, strict=True)],
        bands=bands,
        neighbours=[(near, index.name(near.feature)) for near in row.nearest],
        shown=frozenset(shown),
        before=shown[place - 1] if place > 0 else None,
        after=shown[place + 1] if place + 1 < len(shown) else None,
    )


def _more_facts(row: FeatureRow) -> list[tuple[str, str]]:
    """What only a feature's own page shows."""
    return [
        ("mean", number(row.mean_active)),
        ("q50", number(row.q50)),
        ("q90", number(row.q90)),
        ("border lift", number(row.border_lift, 2)),
    ]


def _write_table(
    index: FeatureIndex, out: Path, lines: Sequence[_Line], *, is_sample: bool
) -> Path:
    table = index.features
    n_dead = int(table.flagged("dead").sum())
    return write_page(
        out / "index.html",
        "index.html",
        **_about(index),
        lines=lines,
        columns=_COLUMNS,
        is_sample=is_sample,
        n_live=len(table) - n_dead,
        n_dead=n_dead,
        flag_counts=[
            (flag, meaning, int(table.flagged(flag).sum()))
            for flag, meaning in FLAG_MEANINGS.items()
        ],
    )


def _about(index: FeatureIndex) -> dict[str, Any]:
    """What every page says of the index."""
    record = index.record
    return {
        "record": record,
        "n_classes": len(record.classes),
    }
