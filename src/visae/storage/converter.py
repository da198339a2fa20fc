"""The strict converter between frozen dataclasses and plain data, on top of cattrs.

Nothing is coerced but a whole number where a number is wanted: text is no list of letters, true
is no 1, 1.0 is no whole number. Two kinds of choice are read by what the data says: ``A | B`` of
dataclasses that each have a ``kind: Literal["..."]`` by that tag, any other union by the first
member that fits. Numbers that JSON lacks are written as the texts NaN, Infinity and -Infinity.
"""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cattrs import BaseValidationError, Converter
from cattrs.cols import (
    homogenous_tuple_structure_factory,
    is_sequence,
    list_structure_factory,
    mapping_structure_factory,
)

from visae.errors import nearest_names

__all__ = ["Mismatch", "strict_converter"]

Hook = Callable[[Any, Any], Any]
HookFactory = Callable[[Any, Converter], Hook]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Mismatch(ValueError):  # noqa: N818
    """A value that its field cannot hold; the text completes "at this key: …"."""


def strict_converter() -> Converter:
    """A converter that refuses unknown keys, wrong types and unknown tags."""
    converter = Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    converter.register_unstructure_hook(Path, lambda path: path.as_posix())
    converter.register_unstructure_hook(float, _plain_float)
    converter.register_structure_hook(Path, lambda value, _: Path(_text(value)))
    converter.register_structure_hook(str, lambda value, _: _text(value))
    converter.register_structure_hook(bool, lambda value, _: _true_or_false(value))
    converter.register_structure_hook(int, lambda value, _: _whole_number(value))
    converter.register_structure_hook(float, lambda value, _: _number(value))
    for applies, factory in _FACTORIES:
        converter.register_structure_hook_factory(applies, factory)
    return converter


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch(f"{_brief(value)} is not text")
    return value


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Mismatch(f"{_brief(value)} is not true or false")
    return value


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Mismatch(f"{_brief(value)} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Mismatch(f"{_brief(value)} is not a number")
    return float(value)


def _plain_float(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def _guarded(factory: HookFactory, shape: type | types.UnionType, what: str) -> HookFactory:
    """A factory whose hooks refuse values of another shape before they look inside."""

    def guarded(target: Any, converter: Converter) -> Hook:
        inner = factory(target, converter)

        def structure(value: Any, wanted: Any) -> Any:
            if not isinstance(value, shape):
                raise Mismatch(f"{_brief(value)} is not {what}")
            return inner(value, wanted)

        return structure

    return guarded


def _fixed_tuple(target: Any, converter: Converter) -> Hook:
    """A tuple of a fixed length, such as ``tuple[int, int]``."""
    inner = converter.gen_structure_hetero_tuple(target)
    n_wanted = len(get_args(target))

    def structure(value: Any, wanted: Any) -> Any:
        if len(value) != n_wanted:
            raise Mismatch(f"{_brief(value)} has {len(value)} entries instead of {n_wanted}")
        return inner(value, wanted)

    return structure


def _literal(target: Any, _converter: Converter) -> Hook:
    choices = get_args(target)

    def structure(value: Any, _wanted: Any) -> Any:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise Mismatch(f"{_brief(value)} is none of: {', '.join(map(str, choices))}")

    return structure


def _union(target: Any, converter: Converter) -> Hook:
    members = tuple(member for member in get_args(target) if member is not types.NoneType)
    optional = len(members) < len(get_args(target))
    inner = _tagged(members, converter) if _has_tags(members) else _first_fit(members, converter)

    def structure(value: Any, _wanted: Any) -> Any:
        if value is None and optional:
            return None
        return inner(value, target)

    return structure


def _first_fit(members: tuple[Any, ...], converter: Converter) -> Hook:
    def structure(value: Any, _wanted: Any) -> Any:
        if len(members) == 1:
            return converter.structure(value, members[0])
        reasons = []
        for member in members:
            try:
                return converter.structure(value, member)
            except Mismatch as failure:
                reasons.append(str(failure))
            except BaseValidationError:
                reasons.append(f"it does not read as {_name(member)}")
        raise Mismatch(" and ".join(reasons))

    return structure


def _tagged(members: tuple[Any, ...], converter: Converter) -> Hook:
    by_tag = {tag: member for member in members for tag in _tags(member)}

    def structure(value: Any, _wanted: Any) -> Any:
        known = ", ".join(sorted(by_tag))
        if not isinstance(value, Mapping):
            raise Mismatch(f"{_brief(value)} is not a table of keys with a kind ({known})")
        tag = value.get("kind")
        if tag is None:
            raise Mismatch(f"the kind is missing (one of: {known})")
        if not isinstance(tag, str) or tag not in by_tag:
            near = nearest_names(str(tag), by_tag)
            raise Mismatch(f"unknown kind {_brief(tag)} (did you mean: {near}?)")
        return converter.structure(value, by_tag[tag])

    return structure


def _tags(member: Any) -> tuple[str, ...]:
    """The texts that a dataclass's ``kind`` may have; none if it has no such literal."""
    if not dataclasses.is_dataclass(member):
        return ()
    kind = get_type_hints(member).get("kind")
    return get_args(kind) if get_origin(kind) is Literal else ()


def _has_tags(members: tuple[Any, ...]) -> bool:
    return len(members) > 1 and all(_tags(member) for member in members)


def _is_union(target: Any) -> bool:
    return get_origin(target) in (Union, types.UnionType)


def _is_tuple(target: Any) -> bool:
    return typing.get_origin(target) is tuple and get_args(target)[-1:] == (...,)


def _is_fixed_tuple(target: Any) -> bool:
    return get_origin(target) is tuple and not _is_tuple(target)


def _is_mapping(target: Any) -> bool:
    origin = get_origin(target) or target
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _plain_mapping(target: Any, converter: Converter) -> Hook:
    """A mapping's own hook, which the converter's method would also register unguarded."""
    hook: Hook = mapping_structure_factory(
        target, converter, detailed_validation=converter.detailed_validation
    )
    return hook


def _name(member: Any) -> str:
    return str(getattr(member, "__name__", member))


def _brief(value: Any) -> str:
    return reprlib.repr(value)


# cattrs asks the factory registered last first, so the general ones come before the special ones.
_FACTORIES: tuple[tuple[Callable[[Any], bool], HookFactory], ...] = (
    (is_sequence, _guarded(list_structure_factory, list | tuple, "a list")),
    (_is_tuple, _guarded(homogenous_tuple_structure_factory, list | tuple, "a list")),
    (_is_fixed_tuple, _guarded(_fixed_tuple, list | tuple, "a list")),
    (
        _is_mapping,
        _guarded(_plain_mapping, Mapping, "a table of keys"),
    ),
    (
        dataclasses.is_dataclass,
        _guarded(lambda t, c: c.gen_structure_attrs_fromdict(t), Mapping, "a table of keys"),
    ),
    (lambda target: get_origin(target) is Literal, _literal),
    (_is_union, _union),
)
