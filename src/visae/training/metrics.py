"""``metrics.jsonl``: one line of figures every few steps, kept in step with resume points."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visae.errors import CheckpointError
from visae.storage.atomic import disk_errors, write_text

__all__ = ["append_metrics", "cut_metrics", "read_metrics"]


def append_metrics(folder: Path, figures: Mapping[str, float | str]) -> None:
    """Add one line."""
    path = folder / "metrics.jsonl"
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(figures)) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line; a last line cut short by a kill is left out.

    Raises:
        CheckpointError: when a line before the last is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as failure:
            if number == len(lines):
                break
            raise CheckpointError(
                f"Line {number} is damaged", where=path, fix="Restore or remove the file"
            ) from failure
    return rows


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines after ``step``, which a resumed run writes again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
