"""``outcomes.parquet``: every image's logits under every condition, for anyone to analyse again.

One row an image and condition. Columns: measurement (``target``, ``others``, ``suppression 0.5``,
``insertion 2``), content_id, row, label, condition (``baseline``, ``edit``, ``random
directions:7``), logits (one number a class; the metadata key ``visae`` names the classes).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32

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

    def logits(self, measurement: str) -> dict[str, Float32[np.ndarray, "image class"]]:
        """The logits under each condition of a measurement, images in the order of the rows."""
        chosen = self.table.filter(pc.field("measurement") == measurement)
        flat = chosen.column("logits").combine_chunks().flatten().to_numpy()
        logits = flat.reshape(-1, len(self.classes))
        conditions = np.array(chosen.column("condition").to_pylist(), dtype=str)
        return {name: logits[conditions == name] for name in dict.fromkeys(conditions.tolist())}


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
            writer.write_table(_rows(images, part).replace_schema_metadata(metadata))


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


def _rows(images: ImageTable, measured: MeasuredImages) -> pa.Table:
    """The rows of one measurement: image after image, each under every condition."""
    effects, conditions = measured.effects, _conditions(measured.families)
    logits = torch.cat(
        [effects.baseline.unsqueeze(1), effects.edited.unsqueeze(1), effects.controls], dim=1
    )
    n_images, n_conditions, n_classes = logits.shape
    image_of_row = [row for row in effects.rows.tolist() for _ in conditions]
    values = pa.array(logits.float().flatten().numpy())
    offsets = np.arange(0, (n_images * n_conditions + 1) * n_classes, n_classes, dtype=np.int32)
    columns = {
        "measurement": [measured.measurement] * len(image_of_row),
        "content_id": [images.content_ids[row] for row in image_of_row],
        "row": image_of_row,
        "label": [images.labels[row] for row in image_of_row],
        "condition": conditions * n_images,
        "logits": pa.ListArray.from_arrays(offsets, values),
    }
    return pa.table(columns, schema=_SCHEMA)


def _conditions(families: Sequence[ControlFamily]) -> list[str]:
    names = ["baseline", "edit"]
    for family in families:
        marks = family.members or range(family.directions.shape[0])
        names += [f"{family.name}:{mark}" for mark in marks]
    return names
