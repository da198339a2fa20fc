"""Where a training run can be taken up again: weights, Adam, loader and counters at one step.

Each SAE of a group keeps its two newest states under ``resume/``. A group resumes from the newest
step that all of them have, so a kill between two files loses nothing.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from visae.activations.mixing_buffer import LoaderState
from visae.errors import CheckpointError
from visae.storage.atomic import write_text
from visae.storage.differences import differences
from visae.storage.records import from_plain, read_json, to_plain
from visae.storage.tensors import read_tensors, write_tensors

__all__ = [
    "ResumePoint",
    "check_points",
    "latest_common_step",
    "read_point",
    "remove_points",
    "require_recipe",
    "write_point",
]

_KEPT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The state of one SAE's training after some step."""

    step: int
    """Steps done."""
    loader: LoaderState
    """Where the loader stands."""
    recipe: dict[str, Any]
    """Every setting of the run, to refuse another one."""


def write_point(folder: Path, point: ResumePoint, state: Mapping[str, Tensor]) -> None:
    """Write a resume point; its JSON is written last. Older ones beyond two are removed."""
    base = folder / "resume"
    name = f"{point.step:08d}"
    write_tensors(base, f"{name}.safetensors", state)
    write_text(base / f"{name}.json", json.dumps(to_plain(point)))
    for old in _steps(folder)[:-_KEPT]:
        (base / f"{old:08d}.json").unlink(missing_ok=True)
        (base / f"{old:08d}.safetensors").unlink(missing_ok=True)


def latest_common_step(folders: Sequence[Path]) -> int | None:
    """The newest step at which every SAE of the group has a resume point."""
    common = set.intersection(*(set(_steps(folder)) for folder in folders))
    return max(common) if common else None


def check_points(folder: Path, *, recipe: dict[str, Any]) -> None:
    """Refuse a folder whose interrupted run was another one.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    for step in _steps(folder)[-1:]:
        require_recipe(folder, _read_json(folder, step).recipe, recipe)


def require_recipe(folder: Path, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Refuse a folder that holds a run of another recipe.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    if changed := differences(found, recipe, then="then"):
        raise CheckpointError(
            f"The run in this folder had other settings ({'; '.join(changed[:6])})",
            where=folder,
            fix="Give the same settings, choose another --out, or delete the folder",
        )


def read_point(folder: Path, step: int) -> tuple[ResumePoint, dict[str, Tensor]]:
    """A resume point and its tensors.

    Raises:
        CheckpointError: when a file is missing or damaged.
    """
    path = folder / "resume" / f"{step:08d}.safetensors"
    return _read_json(folder, step), read_tensors(path, error=CheckpointError)


def _read_json(folder: Path, step: int) -> ResumePoint:
    path = folder / "resume" / f"{step:08d}.json"
    data = read_json(path, error=CheckpointError)
    return from_plain(ResumePoint, data, where=path, error=CheckpointError)


def remove_points(folder: Path) -> None:
    """Remove the resume points of a finished run."""
    for path in sorted((folder / "resume").glob("*")):
        path.unlink()
    if (folder / "resume").is_dir():
        (folder / "resume").rmdir()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "resume").glob("[0-9]*.json"))
