"""The statistics of every feature as a Parquet table, and one feature's row as a dataclass.

What cannot be computed is null in the table and None in a row: the label entropy without labels,
the border lift of a feature that fires on no patch, the position R² of one that never varies.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from visae.errors import FeatureIndexError
from visae.storage.atomic import atomic_path
from visae.storage.hashing import hash_file
from visae.storage.tensors import FileRef

__all__ = ["ClassLift", "FeatureRow", "FeatureTable", "Neighbour", "write_feature_table"]

_FIX = (
    "It was altered or cut short: delete it and run visae index again, which makes what is missing"
)


class ClassLift(NamedTuple):
    """How much a feature prefers a class; descriptive only."""

    name: str
    """Name of the class."""
    lift: float
    """P(class | the feature fires on the image) / P(class)."""
    n_images: int
    """Images of the class on which the feature fires."""


class Neighbour(NamedTuple):
    """A feature whose decoder direction is near."""

    feature: int
    """Its number."""
    cosine: float
    """Cosine of the decoder directions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """What the index knows of one feature, over the indexed images."""

    feature: int
    """Its number."""
    density: float
    """Share of tokens at which it fires."""
    n_tokens_active: int
    """Tokens at which it fires."""
    n_images_active: int
    """Images on which it fires."""
    mean_active: float
    """Mean of its positive activations; 0 if it never fires, as are the quantiles."""
    q50: float
    """Median of its positive activations."""
    q90: float
    """90th percentile of its positive activations."""
    q99: float
    """99th percentile of its positive activations."""
    max: float
    """Largest activation."""
    n_values: int
    """Activations that the quantiles come from: all positive ones, or an even sample of them."""
    label_entropy: float | None
    """Entropy in bits of the classes of the images on which it fires, weighted by its maxima."""
    best_class: str | None
    """The class it prefers most, if any."""
    best_class_lift: float | None
    """P(best class | it fires on the image) / P(best class)."""
    best_class_count: int
    """Images of the best class on which it fires."""
    classes: tuple[str, ...]
    """Up to five preferred classes, best first."""
    class_lifts: tuple[float, ...]
    """Their lifts."""
    class_counts: tuple[int, ...]
    """Their images on which it fires."""
    position_r2: float | None
    """Share of its variance over patches that patch position alone explains."""
    border_lift: float | None
    """Share of its active patches that lie at the border, over the share of all patches."""
    special_share: float | None
    """Share of its active tokens that are special tokens."""
    flags: tuple[str, ...]
    """Reasons for suspicion: ``dead``, ``dense``, ``position``, ``border``, ``special``."""
    neighbours: tuple[int, ...]
    """Features of nearest decoder direction, nearest first."""
    neighbour_cosines: tuple[float, ...]
    """Their cosines."""
    histogram: tuple[int, ...]
    """Counts of positive activations in bins of equal width from 0 to ``max``."""

    @property
    def is_dead(self) -> bool:
        """Whether it never fires."""
        return self.n_tokens_active == 0

    @property
    def preferred(self) -> tuple[ClassLift, ...]:
        """The preferred classes with their lifts and counts."""
        columns = zip(self.classes, self.class_lifts, self.class_counts, strict=True)
        return tuple(ClassLift(*column) for column in columns)

    @property
    def nearest(self) -> tuple[Neighbour, ...]:
        """The nearest features with their cosines."""
        columns = zip(self.neighbours, self.neighbour_cosines, strict=True)
        return tuple(Neighbour(*column) for column in columns)


_HEADER = json.dumps({"kind": "features", "format": 1}).encode()
_TYPES: dict[Any, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
    str | None: pa.string(),
    tuple[int, ...]: pa.list_(pa.int64()),
    tuple[float, ...]: pa.list_(pa.float64()),
    tuple[str, ...]: pa.list_(pa.string()),
}
_SCHEMA = pa.schema(
    [pa.field(f.name, _TYPES[f.type]) for f in dataclasses.fields(FeatureRow)],
    metadata={b"visae": _HEADER},
)


@final
class FeatureTable:
    """The statistics of every feature, by row or by column.

    Raises:
        FeatureIndexError: when the file is missing, damaged or another table.
    """

    def __init__(self, path: Path) -> None:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                self._table = file.read()
        except (OSError, pa.ArrowException) as failure:
            what = "This table of features is missing or damaged"
            raise FeatureIndexError(what, where=path, fix=_FIX) from failure
        schema = self._table.schema
        if not _SCHEMA.equals(schema) or (schema.metadata or {}).get(b"visae") != _HEADER:
            what = "This is not visae's table of features"
            raise FeatureIndexError(what, where=path, fix=_FIX)

    def __len__(self) -> int:
        """Number of features."""
        return int(self._table.num_rows)

    def row(self, feature: int) -> FeatureRow:
        """The statistics of one feature.

        Raises:
            FeatureIndexError: when there is no such feature.
        """
        if not 0 <= feature < len(self):
            raise FeatureIndexError(
                f"There is no feature {feature}", fix=f"Give a number from 0 to {len(self) - 1}"
            )
        (found,) = self._table.slice(feature, 1).to_pylist()
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
        }
        return FeatureRow(**values)

    def column(self, name: str) -> Shaped[np.ndarray, " feature"]:
        """One statistic of every feature; null becomes NaN or None.

        Raises:
            FeatureIndexError: when there is no such statistic.
        """
        if name not in _SCHEMA.names:
            what = f"There is no statistic {name}"
            raise FeatureIndexError(what, fix=f"Use one of: {', '.join(_SCHEMA.names)}")
        values: np.ndarray = self._table.column(name).to_numpy()
        return values

    def flagged(self, flag: str) -> Shaped[np.ndarray, " feature"]:
        """Whether each feature has a flag."""
        return np.array([flag in flags for flags in self._table.column("flags").to_pylist()])


def write_feature_table(folder: Path, name: str, columns: Mapping[str, Any]) -> FileRef:
    """Write the columns of ``FeatureRow``, atomically; NaN becomes null."""
    arrays = [
        pa.array(columns[field.name], field.type, from_pandas=field.type == pa.float64())
        for field in _SCHEMA
    ]
    with atomic_path(folder / name) as temporary:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=_SCHEMA),
            temporary,
            compression="zstd",
            write_page_checksum=True,
        )
        n_bytes, digest = temporary.stat().st_size, hash_file(temporary)
    return FileRef(name=name, n_bytes=n_bytes, sha256=digest)
