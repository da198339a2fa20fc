"""Locations as users type them: a path or address, with options behind a question mark.

``labels.csv?label=name&root=images`` is the path ``labels.csv`` and two options. A file or folder
whose own name holds a question mark is taken as it stands.
"""

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote

from visae.errors import ImageError, nearest_names

__all__ = [
    "is_folder",
    "is_there",
    "join_options",
    "nearest_siblings",
    "replace_path",
    "split_options",
]

_SCHEMES_OF_PATHS = ("seg:", "wds:")


def split_options(location: str) -> tuple[str, dict[str, str]]:
    """The address before the last question mark, and the options behind it.

    Raises:
        ImageError: when the options are not ``key=value`` joined by ``&``, or name a key twice.
    """
    address, mark, text = location.rpartition("?")
    if not mark or is_there(Path(location)):
        return location, {}
    try:
        pairs = parse_qsl(text, strict_parsing=True)
    except ValueError as failure:
        raise _malformed(location) from failure
    options = dict(pairs)
    if len(options) != len(pairs) or len(pairs) != text.count("&") + 1:
        raise _malformed(location)
    return address, options


def join_options(address: str, options: Mapping[str, str | None]) -> str:
    """The location that ``split_options`` takes apart again; options of None are left out."""
    given = [f"{key}={quote(value)}" for key, value in options.items() if value is not None]
    return f"{address}?{'&'.join(given)}" if given else address


def replace_path(location: str, change: Callable[[str], str]) -> str:
    """The location with its path changed; one that starts with another scheme stays as it is."""
    scheme = next((known for known in _SCHEMES_OF_PATHS if location.startswith(known)), "")
    path, mark, options = location.removeprefix(scheme).partition("?")
    if ":" in path.split("/")[0]:
        return location
    return f"{scheme}{change(path)}{mark}{options}"


def is_there(path: Path) -> bool:
    """Whether something can be seen at a path, whatever was typed."""
    return _mode(path) != 0


def is_folder(path: Path) -> bool:
    """Whether a folder can be seen at a path, whatever was typed."""
    return stat.S_ISDIR(_mode(path))


def nearest_siblings(path: Path) -> str:
    """Names beside a missing path that are close to it, after its first missing part."""
    missing = path.absolute()
    while not is_folder(missing.parent):
        missing = missing.parent
    try:
        names = [child.name for child in missing.parent.iterdir() if child.name[0] != "."]
    except PermissionError:
        names = []
    return f"{missing.parent} holds: {nearest_names(missing.name, names)}"


def _mode(path: Path) -> int:
    """The file mode, 0 where none can be had; ``Path.exists`` raises for a name too long."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _malformed(location: str) -> ImageError:
    return ImageError(
        "The options behind the question mark cannot be read",
        where=location,
        fix="Write each once with a value, as in labels.csv?label=name&root=images",
    )
