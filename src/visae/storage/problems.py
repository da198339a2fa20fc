"""What cattrs found wrong, as short sentences that each name a key by its full path."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from cattrs import BaseValidationError
from cattrs.errors import (
    AttributeValidationNote,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from visae.errors import VisaeError, nearest_names

__all__ = ["Problem", "problems"]

_REMEDY = "Correct the keys named here"


class Problem(NamedTuple):
    """One thing wrong with plain data."""

    text: str
    """The key, such as ``train.edits[0].dose``, and what is wrong with it."""
    remedy: str
    """What to do, as one imperative sentence without a final stop."""


def problems(failure: BaseException, path: str = "") -> Iterator[Problem]:
    """Every leaf of a cattrs error tree, in the order of the fields."""
    if isinstance(failure, BaseValidationError):
        for inner in failure.exceptions:
            yield from problems(inner, path + _step(inner))
    elif isinstance(failure, ForbiddenExtraKeysError):
        yield from _unknown_keys(failure, path)
    elif isinstance(failure, VisaeError):
        place = f" ({failure.where})" if failure.where else ""
        yield Problem(f"{_prefix(path)}{failure.what}{place}", failure.fix)
    else:
        yield Problem(f"{_prefix(path)}{_reason(failure)}", _REMEDY)


def _unknown_keys(failure: ForbiddenExtraKeysError, path: str) -> Iterator[Problem]:
    known = [field.name for field in dataclasses.fields(failure.cl)]
    for key in sorted(failure.extra_fields, key=str):
        near = nearest_names(str(key), known, count=3)
        yield Problem(f"unknown key {_join(path, key)} (did you mean: {near}?)", _REMEDY)


def _step(failure: BaseException) -> str:
    """The part of the path that leads to an inner error: ``.name`` or ``[index]``."""
    for note in getattr(failure, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return f".{note.name}"
        if isinstance(note, IterableValidationNote):
            return f"[{note.index}]" if isinstance(note.index, int) else f".{note.index}"
    return ""


def _join(path: str, key: object) -> str:
    return f"{path}.{key}".removeprefix(".")


def _prefix(path: str) -> str:
    return f"{path.removeprefix('.')}: " if path else ""


def _reason(failure: BaseException) -> str:
    if isinstance(failure, KeyError) and _step(failure):
        return "missing"
    return str(failure) or type(failure).__name__
