"""Records without what they say about the machine they were made on, before they are published.

An absolute path tells a user's name and how a lab keeps its data; so may the name of a machine.
"""

import platform
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Redacted", "redact"]

_START = r"(?:^|(?<=[\s:=,;|'\"(\[{]))"
_ROOT = r"(?:[A-Za-z]:[/\\]|\\\\|~[^/\s]*/|/(?=[^/\s]))"
_STEPS = r"(?:[^\s:;,?|'\"()\[\]/\\][^:;,?|'\"()\[\]/\\\n]*[/\\])*"
_LAST = r"(?P<last>[^\s:;,?|'\"()\[\]/\\][^\s:;,?|'\"()\[\]/\\]*)[/\\]?"
_PATH = re.compile(_START + _ROOT + _STEPS + _LAST)
_TELLING = re.compile(r"(?=.*[\d.-]).{5,}")


class Redacted(NamedTuple):
    """Plain data that tells nothing of a machine."""

    data: Any
    """The data, in which a path is its last name."""
    changed: tuple[str, ...]
    """Keys that were changed, such as ``provenance.images``."""


def redact(data: Any) -> Redacted:
    """Replace absolute paths by their last names, and the name of this machine by ``machine``.

    A machine's name is looked for if it is telling: of some length, with a digit, dash or dot.
    """
    changed: list[str] = []
    return Redacted(_walk(data, "", changed), tuple(changed))


def _walk(data: Any, key: str, changed: list[str]) -> Any:
    if isinstance(data, dict):
        return {
            _text(str(name), f"{key}.{name}", changed): _walk(value, f"{key}.{name}", changed)
            for name, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [_walk(value, f"{key}[{place}]", changed) for place, value in enumerate(data)]
    return _text(data, key, changed) if isinstance(data, str) else data


def _text(text: str, key: str, changed: list[str]) -> str:
    clean = _PATH.sub(lambda match: match["last"], text)
    for name in _machine_names():
        clean = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "machine", clean)
    if clean != text:
        changed.append(key.removeprefix("."))
    return clean


def _machine_names() -> Iterator[str]:
    """The full name of this machine, then its first part."""
    name = platform.node()
    for text in dict.fromkeys((name, name.partition(".")[0])):
        if _TELLING.fullmatch(text):
            yield text
