"""Which keys of two pieces of plain data differ, and how: for errors that name what changed."""

import reprlib
from collections.abc import Iterator
from typing import Any

__all__ = ["differences"]

_MISSING = object()


def differences(old: Any, new: Any, *, then: str = "there") -> list[str]:
    """One text for each leaf that differs: ``identity.name: 'a' there, 'b' now``.

    Lists of equal length are compared item by item; the texts are in the order of ``old``'s keys.
    """
    return [
        f"{path}: {_brief(before)} {then}, {_brief(after)} now"
        for path, before, after in _leaves(old, new, "")
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


def _brief(value: Any) -> str:
    return "nothing" if value is _MISSING else reprlib.repr(value)
