"""``outcomes.parquet``: every image's logits under every condition, for anyone to analyse again.

One row an image and condition. Columns: measurement (``target``, ``others``, ``suppression 0.5``,
``insertion 2``), content_id, row, label, condition (``baseline``, ``edit``, ``random
directions:7``), logits (one number a class; the metadata key ``visae`` names the classes).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from visae.errors import ExperimentError
from visae.images.catalog import ImageTable
from visae.interventions.controls import ControlFamily
from visae.interventions.effects import Effects
from visae.storage.atomic import atomic_path

__all__ = ["MeasuredImages", "OutcomeTable", "read_outcomes", "write_outcomes"]

_SCHEMA = pa.schema(
    [
        ("measurement", pa.string()),
        ("content_id", pa.string()),
        ("row", pa.int64()),
        ("label", pa.string()),
        ("condition", pa.string()),
        ("logits", pa.list_(pa.float32())),
    ]
)
_HEADER = {"kind": "outcomes", "format": 1}


class MeasuredImages(NamedTuple):
    """Effects with the families that their control draws belong to, in order."""

    measurement: str
    """``target``, ``others``, or a curve and dose."""
    effects: Effects
    """Logits of the images."""
    families: Sequence[ControlFamily]
    """Where the draws come from."""


class OutcomeTable(NamedTuple):
    """The outcomes of an experiment, as they are on disk."""

    classes: tuple[str, ...]
    """Class of each logit."""
    table: pa.Table
    """The rows."""


def write_outcomes(
    path: Path,
    images: ImageTable,
    classes: Sequence[str],
    measured: Sequence[MeasuredImages],
) -> None:
    """Write the outcomes of every measurement, atomically."""
    metadata = {"visae": json.dumps(_HEADER | {"classes": list(classes)})}
    schema = _SCHEMA.with_metadata(metadata)
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer,
    ):
        for part in measured:
            writer.write_table(pa.table(_columns(images, part), schema=schema))


def read_outcomes(path: Path) -> OutcomeTable:
    """Read the outcomes of an experiment, verifying their checksums.

    Raises:
        ExperimentError: when the file is missing, damaged or another table.
    """
    fix = "It was altered or cut short: restore it, or delete the folder and run it again"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        header = json.loads((table.schema.metadata or {}).get(b"visae", b"{}"))
    except (OSError, pa.ArrowException, ValueError) as failure:
        what = "This table of outcomes is missing or damaged"
        raise ExperimentError(what, where=path, fix=fix) from failure
    if not table.schema.equals(_SCHEMA) or {k: header.get(k) for k in _HEADER} != _HEADER:
        raise ExperimentError("This is not visae's table of outcomes", where=path, fix=fix)
    return OutcomeTable(tuple(header["classes"]), table)


def _columns(images: ImageTable, measured: MeasuredImages) -> dict[str, list[Any]]:
    effects, conditions = measured.effects, _conditions(measured.families)
    columns: dict[str, list[Any]] = {column: [] for column in _SCHEMA.names}
    for i, row in enumerate(effects.rows.tolist()):
        logits = [effects.baseline[i], effects.edited[i], *effects.controls[i]]
        columns["measurement"] += [measured.measurement] * len(conditions)
        columns["content_id"] += [images.content_ids[row]] * len(conditions)
        columns["row"] += [row] * len(conditions)
        columns["label"] += [images.labels[row]] * len(conditions)
        columns["condition"] += conditions
        columns["logits"] += [value.tolist() for value in logits]
    return columns


def _conditions(families: Sequence[ControlFamily]) -> list[str]:
    names = ["baseline", "edit"]
    for family in families:
        marks = family.members or range(family.directions.shape[0])
        names += [f"{family.name}:{mark}" for mark in marks]
    return names
