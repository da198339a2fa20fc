"""The names of the class values of masks, from a file that a person wrote.

``classes.csv`` has lines ``value,name`` (a header may stand above them), ``classes.txt`` one name a
line starting with that of value 0, ``classes.json`` an object ``{"0": "sky"}`` or a list.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visae.errors import ImageError

__all__ = ["CLASS_FILES", "read_class_names"]

CLASS_FILES = ("classes.csv", "classes.txt", "classes.json")
_FIX = "Write lines value,name (.csv), one name a line from value 0 on (.txt) or an object (.json)"


def read_class_names(path: Path) -> dict[int, str]:
    """The name of each class value.

    Raises:
        ImageError: when the file is missing, of another kind, damaged, or gives a value or a name
            twice.
    """
    pairs = [(str(value).strip(), str(name).strip()) for value, name in _read(path)]
    for value, name in pairs:
        if not (value.isascii() and value.isdecimal() and len(value) < 10 and name):
            what = f"{value!r}, {name!r} are no class value and its name"
            raise ImageError(what, where=path, fix=_FIX)
    names = {int(value): name for value, name in pairs}
    if not pairs or len(names) != len(pairs) or len(set(names.values())) != len(pairs):
        what = "This file names a value or a name twice" if pairs else "This file names no classes"
        raise ImageError(what, where=path, fix="Give each value one name of its own")
    return names


def _read(path: Path) -> Iterable[tuple[Any, Any]]:
    reader = {".csv": _pairs_of_csv, ".txt": _pairs_of_lines, ".json": _pairs_of_json}.get(
        path.suffix.lower()
    )
    if reader is None:
        raise ImageError("This is no file of class names", where=path, fix=_FIX)
    try:
        return reader(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as failure:
        what = "There is no such file of class names"
        raise ImageError(what, where=path, fix="Correct ?classes=") from failure
    except OSError as failure:
        reason = (failure.strerror or "unknown reason").lower()
        what = f"This file of class names cannot be opened: {reason}"
        raise ImageError(what, where=path, fix="Check the path and its permissions") from failure
    except (ValueError, RecursionError, csv.Error) as failure:
        what = f"This file of class names cannot be read: {failure}"
        raise ImageError(what, where=path, fix=_FIX) from failure


def _pairs_of_csv(text: str) -> Iterable[tuple[str, str]]:
    rows = [row for row in csv.reader(text.splitlines(), strict=True) if row]
    if rows and not rows[0][0].strip().isdecimal():
        rows = rows[1:]
    wrong = next((row for row in rows if len(row) != 2), None)
    if wrong is not None:
        raise ValueError(f"the line {','.join(wrong)} has {len(wrong)} cells, not 2")
    return [(value, name) for value, name in rows]


def _pairs_of_lines(text: str) -> Iterable[tuple[int, str]]:
    return enumerate(text.splitlines())


def _pairs_of_json(text: str) -> Iterable[tuple[Any, Any]]:
    found = json.loads(text)
    if isinstance(found, dict):
        return found.items()
    if isinstance(found, list):
        return enumerate(found)
    raise ValueError("it holds neither an object nor a list")
