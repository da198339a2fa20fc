"""Frozen dataclasses as JSON or TOML, read strictly.

A record that stands for a file carries ``kind`` and ``format``; reading refuses another kind, a
newer format, an unknown key (with the nearest known ones), a missing key and a wrong type. A field
typed as a union of dataclasses that each have a ``kind: Literal["..."]`` is read by that tag.
"""

import dataclasses
import functools
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from visae.errors import ConfigError, VisaeError
from visae.storage.atomic import write_text

if TYPE_CHECKING:
    from cattrs import Converter

__all__ = ["from_plain", "read_json", "read_record", "read_toml", "to_plain", "write_record"]

R = TypeVar("R")


def to_plain(record: Any) -> Any:
    """A dataclass as plain dicts, lists, strings and numbers."""
    return _converter().unstructure(record)


def from_plain(
    record_type: type[R],
    data: Any,
    *,
    where: object = "",
    error: type[VisaeError] = ConfigError,
) -> R:
    """A dataclass from plain data.

    Raises:
        VisaeError: of type ``error``, naming every key that is unknown, missing or mistyped.
    """
    from cattrs import BaseValidationError

    from visae.storage.converter import Mismatch
    from visae.storage.problems import problems

    try:
        return _converter().structure(data, record_type)
    except (BaseValidationError, Mismatch) as failure:
        found = list(problems(failure))
        raise error(
            f"Cannot read this as {getattr(record_type, '__name__', record_type)}: "
            + "; ".join(problem.text for problem in found),
            where=where,
            fix=". ".join(dict.fromkeys(problem.remedy for problem in found)),
        ) from failure


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as indented JSON, atomically."""
    text = json.dumps(to_plain(record), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_record(record_type: type[R], path: Path, *, error: type[VisaeError] = ConfigError) -> R:
    """Read a dataclass from JSON, checking its ``kind`` and ``format`` where it has them."""
    data = read_json(path, error=error)
    expected = {f.name: f.default for f in dataclasses.fields(cast(Any, record_type))}
    if "kind" in expected:
        _check_kind(data, cast(str, expected["kind"]), path, error)
    if "format" in expected:
        _check_format(data, cast(int, expected["format"]), path, error)
    return from_plain(record_type, data, where=path, error=error)


def read_json(path: Path, *, error: type[VisaeError] = ConfigError) -> Any:
    """Read JSON, or raise ``error`` that says what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise _without_content(path, failure, error) from failure
    except (ValueError, RecursionError) as failure:
        raise error(
            f"This file is not valid JSON: {failure}",
            where=path,
            fix="It was altered or cut short: restore it or make it again",
        ) from failure


def read_toml(path: Path) -> dict[str, Any]:
    """Read TOML, or raise ``ConfigError`` that says what is wrong with the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise _without_content(path, failure, ConfigError) from failure
    except (ValueError, RecursionError) as failure:
        raise ConfigError(
            f"This file is not valid TOML: {failure}", where=path, fix="Correct the line named"
        ) from failure


def _check_kind(data: Any, known: str, path: Path, error: type[VisaeError]) -> None:
    found = data.get("kind") if isinstance(data, dict) else None
    if found != known:
        raise error(
            f"This is {found or 'no visae file'}, not {known}",
            where=path,
            fix=f"Give the path of one whose kind is {known}",
        )


def _check_format(data: Any, known: int, path: Path, error: type[VisaeError]) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is not int or found < 1:
        raise error(
            "This file does not say in which format it is written",
            where=path,
            fix="It was altered: restore it or make it again",
        )
    if found > known:
        raise error(
            f"Format {found} is newer than format {known}, the newest this visae reads",
            where=path,
            fix="Upgrade visae",
        )


def _without_content(path: Path, failure: OSError, error: type[VisaeError]) -> VisaeError:
    if isinstance(failure, FileNotFoundError):
        return error("There is no such file", where=path, fix="Check the path")
    reason = (failure.strerror or str(failure)).lower()
    return error(f"This file cannot be read: {reason}", where=path, fix="Check the path")


@functools.cache
def _converter() -> "Converter":
    from visae.storage.converter import strict_converter

    return strict_converter()
