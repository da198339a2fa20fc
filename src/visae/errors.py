"""What can go wrong, as one tree; every message says what, where and what to do.

VisaeError
├── ConfigError         a setting, flag or spec key that cannot be used
├── ImageError          an image, image folder or manifest that cannot be read
├── ModelError          an unknown model or site, or weights that do not fit
├── StoreError          an activation store (or the disk below it) that cannot be written or read
├── CheckpointError     an SAE that cannot be loaded or does not reproduce its own codes
├── FeatureIndexError   a feature index that is missing, altered or made from another SAE
├── ExperimentError     an experiment that would not mean what it says
└── ServeError          a web app that cannot start

The command line prints ``str(error)`` in one paragraph and leaves with exit code 2.
"""

import difflib
import functools
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExperimentError",
    "FeatureIndexError",
    "ImageError",
    "ModelError",
    "ServeError",
    "StoreError",
    "VisaeError",
    "nearest_names",
]


class VisaeError(Exception):
    """Base of every error a user can cause or mend.

    Args:
        what: What happened, as one clause without a final stop.
        where: The path, field, shape or image it happened at.
        fix: What to do next, as one imperative sentence without a final stop.
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what = what
        self.where = str(where)
        self.fix = fix
        place = f" ({self.where})" if self.where else ""
        remedy = f" {fix}." if fix else ""
        super().__init__(f"{what}{place}.{remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Processes send errors to each other whole."""
        return functools.partial(type(self), self.what, where=self.where, fix=self.fix), ()


class ConfigError(VisaeError):
    """A setting, flag or spec key that cannot be used."""


class ImageError(VisaeError):
    """An image, image folder or manifest that cannot be read."""


class ModelError(VisaeError):
    """An unknown model or site, or weights that do not fit."""


class StoreError(VisaeError):
    """An activation store, or the disk below it, that cannot be written or read."""


class CheckpointError(VisaeError):
    """An SAE that cannot be loaded or does not reproduce its own codes."""


class FeatureIndexError(VisaeError):
    """A feature index that is missing, altered or made from another SAE."""


class ExperimentError(VisaeError):
    """An experiment that would not mean what it says."""


class ServeError(VisaeError):
    """A web app that cannot start."""


def nearest_names(name: str, known: Iterable[str], *, count: int = 5) -> str:
    """The known names closest to a misspelt one, as text for an error's remedy."""
    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.4)
    return ", ".join(close or options[:count]) or "none"
