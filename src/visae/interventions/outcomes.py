"""``outcomes.parquet``: every image's logits under every condition, for anyone to analyse again."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from visae.activations.store import ActivationStore
from visae.interventions.controls import ControlFamily
from visae.interventions.effects import Effects
from visae.storage.atomic import atomic_path

__all__ = ["write_outcomes"]


def write_outcomes(
    path: Path, store: ActivationStore, effects: Effects, families: Sequence[ControlFamily]
) -> None:
    """One row an image and condition (``baseline``, ``edit``, ``random directions:7``).

    Columns: content_id, row, label, condition, logits (one number a class).
    """
    names = ["baseline", "edit"]
    for family in families:
        marks = family.members or range(family.directions.shape[0])
        names += [f"{family.name}:{mark}" for mark in marks]
    columns: dict[str, list[object]] = {
        name: [] for name in ("content_id", "row", "label", "condition", "logits")
    }
    for i, row in enumerate(effects.rows.tolist()):
        logits = [effects.baseline[i], effects.edited[i], *effects.controls[i]]
        columns["content_id"] += [store.images.content_ids[row]] * len(names)
        columns["row"] += [row] * len(names)
        columns["label"] += [store.images.labels[row]] * len(names)
        columns["condition"] += names
        columns["logits"] += [value.tolist() for value in logits]
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
