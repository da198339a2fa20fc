"""Send the figures of training to trackio, wandb or tensorboard, besides ``metrics.jsonl``.

Each SAE of a group is a run of its own there. A resumed run goes on in the same one.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from visae.errors import ConfigError
from visae.storage.hashing import hash_json

__all__ = ["Tracker", "TrackerName", "open_tracker", "require_installed"]

TrackerName = Literal["trackio", "wandb", "tensorboard"]

_PROJECT = "visae"
_MODULES: dict[TrackerName, str] = {
    "trackio": "trackio",
    "wandb": "wandb",
    "tensorboard": "torch.utils.tensorboard",
}


@runtime_checkable
class Tracker(Protocol):
    """Where the figures of one SAE go."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Send what is left."""


def require_installed(name: TrackerName | None) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        ConfigError: naming the extra that installs it.
    """
    if name is not None:
        _package(name)


def open_tracker(
    name: TrackerName, folder: Path, *, recipe: Mapping[str, Any], step: int
) -> Tracker:
    """The tracker of the SAE in a folder, whose run is named after it and goes on from a step.

    Raises:
        ConfigError: when the package is not installed.
    """
    package = _package(name)
    if name == "tensorboard":
        return _Tensorboard(package, folder, step)
    named = {"project": _PROJECT, "name": folder.name, "config": dict(recipe)}
    if name == "trackio":
        return _Run(package.init(**named, resume="allow" if step else "never", embed=False))
    identity = hash_json([folder.name, recipe])[:16]
    return _Run(package.init(**named, dir=folder, id=identity, resume="allow", reinit="create_new"))


class _Run:
    """A run of trackio or wandb, which have the same methods."""

    def __init__(self, started: Any) -> None:
        self._run = started

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    """Event files in the SAE's own folder; those of steps to be made again are dropped."""

    def __init__(self, package: Any, folder: Path, step: int) -> None:
        self._writer = package.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _package(name: TrackerName) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as failure:
        raise ConfigError(
            f"{name} is not installed",
            where=f"track {name}",
            fix='Install it with: pip install "visae[track]"; metrics.jsonl is written in any case',
        ) from failure
