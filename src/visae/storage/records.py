"""Frozen dataclasses as JSON or TOML, read strictly.

A record that stands for a file carries ``kind`` and ``format``; reading refuses another kind, a
newer format, an unknown key (with the nearest known ones), a missing key and a wrong type.
"""

import dataclasses
import functools
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar, cast

from visae.errors import ConfigError, VisaeError, nearest_names
from visae.storage.atomic import write_text

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
    import cattrs

    try:
        return cast(R, _converter().structure(data, record_type))
    except cattrs.BaseValidationError as failure:
        problems = "; ".join(_problems(failure, record_type))
        raise error(
            f"Cannot read this as a {record_type.__name__}: {problems}",
            where=where,
            fix="Correct or remove the keys named here",
        ) from failure


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as indented JSON, atomically."""
    write_text(path, json.dumps(to_plain(record), indent=1, ensure_ascii=False) + "\n")


def read_record(record_type: type[R], path: Path, *, error: type[VisaeError] = ConfigError) -> R:
    """Read a dataclass from JSON, checking its ``kind`` and ``format`` where it has them."""
    data = read_json(path, error=error)
    expected = {f.name: f.default for f in dataclasses.fields(cast(Any, record_type))}
    kind = data.get("kind") if isinstance(data, dict) else None
    if "kind" in expected and kind != expected["kind"]:
        raise error(
            f"This is {kind or 'no visae file'}, not {expected['kind']}",
            where=path,
            fix=f"Give the folder of a {expected['kind']}",
        )
    if "format" in expected and isinstance(data.get("format"), int):
        _check_format(data["format"], cast(int, expected["format"]), path, error)
    return from_plain(record_type, data, where=path, error=error)


def read_json(path: Path, *, error: type[VisaeError] = ConfigError) -> Any:
    """Read JSON, or raise ``error`` that says what is wrong with the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise error("There is no such file", where=path, fix="Check the path") from failure
    except (NotADirectoryError, IsADirectoryError, PermissionError) as failure:
        raise error("This file cannot be opened", where=path, fix="Check the path") from failure
    except ValueError as failure:
        raise error(
            f"This file is not valid JSON: {failure}",
            where=path,
            fix="It was altered or cut short: restore it or make it again",
        ) from failure


def read_toml(path: Path) -> dict[str, Any]:
    """Read TOML, or raise ``ConfigError`` that says what is wrong with the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failure:
        raise ConfigError("This file cannot be read", where=path, fix="Check the path") from failure
    except tomllib.TOMLDecodeError as failure:
        raise ConfigError(
            f"This file is not valid TOML: {failure}", where=path, fix="Correct the line named"
        ) from failure


def _check_format(found: int, known: int, path: Path, error: type[VisaeError]) -> None:
    if found > known:
        raise error(
            f"Format {found} is newer than format {known}, the newest this visae reads",
            where=path,
            fix="Upgrade visae",
        )


@functools.cache
def _converter() -> Any:
    import cattrs
    from cattrs.preconf.json import make_converter

    converter = make_converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(Path, lambda value, _: Path(_text(value)))
    converter.register_unstructure_hook(Path, lambda path: path.as_posix())
    converter.register_structure_hook(str, lambda value, _: _text(value))
    converter.register_structure_hook(bool, lambda value, _: _typed(value, bool))
    converter.register_structure_hook(int, lambda value, _: _typed(value, int))
    converter.register_structure_hook(float, lambda value, _: float(_number(value)))
    assert isinstance(converter, cattrs.Converter)
    return converter


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {'true or false' if kind is bool else 'a whole number'}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _problems(failure: BaseException, record_type: Any, path: str = "") -> list[str]:
    """Every leaf of a cattrs error tree as one short sentence that names its key."""
    from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

    if isinstance(failure, ForbiddenExtraKeysError):
        known = [f.name for f in dataclasses.fields(failure.cl)]
        return [
            f"unknown key {path}{key} (did you mean: {nearest_names(key, known, count=3)}?)"
            for key in sorted(failure.extra_fields)
        ]
    if isinstance(failure, BaseValidationError):
        found = []
        for inner in failure.exceptions:
            name = _note_name(inner)
            deeper = f"{path}{name}." if name and isinstance(inner, BaseValidationError) else path
            if name and not isinstance(inner, BaseValidationError):
                found.append(f"{path}{name}: {_reason(inner)}")
            else:
                found.extend(_problems(inner, record_type, deeper))
        return found
    return [f"{path.rstrip('.')}: {_reason(failure)}" if path else _reason(failure)]


def _note_name(failure: BaseException) -> str:
    """The key or index at which cattrs noted an inner error."""
    for note in getattr(failure, "__notes__", []):
        name = getattr(note, "name", None)
        if name is None:
            name = getattr(note, "index", None)
        if name is not None:
            return str(name)
    return ""


def _reason(failure: BaseException) -> str:
    if isinstance(failure, KeyError):
        return "missing"
    return str(failure) or type(failure).__name__
