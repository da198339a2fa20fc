"""Which keys of two pieces of plain data differ, and how: for errors that name what changed."""

import reprlib
from collections.abc import Iterator
from typing import Any

__all__ = ["differences"]

_MISSING = object()
_BEFORE, _AFTER = 8, 24  # characters shown around the first that differs


def differences(old: Any, new: Any, *, then: str = "there") -> list[str]:
    """One text for each leaf that differs: ``identity.name: 'a' there, 'b' now``.

    Lists of equal length are compared item by item; the texts are in the order of ``old``'s keys.
    """
    return [
        f"{path}: {before} {then}, {after} now"
        for path, *values in _leaves(old, new, "")
        for before, after in [_pair(*values)]
    ]


def _leaves(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            step = f"{path}.{key}".removeprefix(".")
            yield from _leaves(old.get(key, _MISSING), new.get(key, _MISSING), step)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _leaves(*pair, f"{path}[{index}]")
    elif old != new:
        yield path, old, new


def _pair(old: Any, new: Any) -> tuple[str, str]:
    """Both values, short; two long texts that look the same then are cut where they differ."""
    shown = _brief(old), _brief(new)
    if shown[0] != shown[1] or not (isinstance(old, str) and isinstance(new, str)):
        return shown
    pairs = enumerate(zip(old, new, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))
    return _cut(old, first), _cut(new, first)


def _cut(text: str, at: int) -> str:
    """The part of a long text around a position."""
    start, stop = max(0, at - _BEFORE), at + _AFTER
    before, after = "…" if start else "", "…" if stop < len(text) else ""
    return repr(f"{before}{text[start:stop]}{after}")


def _brief(value: Any) -> str:
    return "nothing" if value is _MISSING else reprlib.repr(value)
