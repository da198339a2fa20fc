"""The strict converter: everything it writes it reads, and nothing else."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.storage.records import from_plain, to_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablate:
    kind: Literal["ablate"] = "ablate"
    features: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steer:
    kind: Literal["steer", "push"] = "steer"
    dose: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    name: str
    count: int
    share: float
    on: bool
    path: Path
    mode: Literal["cosine", "linear", 3]
    grid: tuple[int, float]
    names: tuple[str, ...]
    more: Sequence[int]
    weights: Mapping[str, float]
    edit: Ablate | Steer
    edits: tuple[Ablate | Steer, ...]
    by_name: dict[str, Ablate | Steer | None]
    maybe: float | None
    maybe_path: Path | None
    maybe_edit: Ablate | Steer | None
    either: int | str
    noted: Annotated[Ablate | Steer, "a note"]
    inner: "tuple[Ablate, ...]"


TEXT = st.text(max_size=5)
INTEGER = st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(allow_nan=False)
PATH = st.builds(Path, st.text("ab/.", min_size=1, max_size=5))
ABLATE = st.builds(Ablate, features=st.lists(INTEGER, max_size=2).map(tuple))
EDIT = ABLATE | st.builds(Steer, kind=st.sampled_from(["steer", "push"]), dose=FLOAT)
EVERYTHING = st.builds(
    Everything,
    name=TEXT,
    count=INTEGER,
    share=FLOAT,
    on=st.booleans(),
    path=PATH,
    mode=st.sampled_from(["cosine", "linear", 3]),
    grid=st.tuples(INTEGER, FLOAT),
    names=st.lists(TEXT, max_size=2).map(tuple),
    more=st.lists(INTEGER, max_size=2),
    weights=st.dictionaries(TEXT, FLOAT, max_size=2),
    edit=EDIT,
    edits=st.lists(EDIT, max_size=2).map(tuple),
    by_name=st.dictionaries(TEXT, EDIT | st.none(), max_size=2),
    maybe=FLOAT | st.none(),
    maybe_path=PATH | st.none(),
    maybe_edit=EDIT | st.none(),
    either=INTEGER | TEXT,
    noted=EDIT,
    inner=st.lists(ABLATE, max_size=2).map(tuple),
)


@given(EVERYTHING)
def test_records_come_back_from_json(record):
    plain = to_plain(record)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert from_plain(Everything, plain) == record


@given(ABLATE | st.builds(Steer, dose=FLOAT))
def test_records_come_back_from_toml(record):
    read = tomllib.loads(tomli_w.dumps(to_plain(record)))
    assert from_plain(type(record), read) == record


def test_plain_data_is_only_dicts_lists_texts_and_numbers():
    assert to_plain({"grid": (1, 2), "path": Path("a/b")}) == {"grid": [1, 2], "path": "a/b"}


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_numbers_that_json_lacks_are_written_as_text(value, text):
    plain = to_plain(Steer(dose=value))
    assert plain == {"kind": "steer", "dose": text}
    assert repr(from_plain(Steer, plain).dose) == repr(value)


def accepted(wanted: Any, value: Any) -> Any:
    """What a field of this type makes of a value."""
    record_type = dataclasses.make_dataclass("Record", [("key", wanted)])
    return from_plain(record_type, {"key": value}).key


def refusal(wanted: Any, value: Any) -> str:
    """What is said about a value that a field of this type cannot hold."""
    record_type = dataclasses.make_dataclass("Record", [("key", wanted)])
    with pytest.raises(ConfigError) as caught:
        from_plain(record_type, {"key": value})
    return caught.value.what.removeprefix("Cannot read this as Record: ")


@pytest.mark.parametrize(
    ("wanted", "value", "said"),
    [
        (str, 3, "key: 3 is not text"),
        (Path, 3, "key: 3 is not text"),
        (int, True, "key: True is not a whole number"),
        (int, 1.0, "key: 1.0 is not a whole number"),
        (int, "1", "key: '1' is not a whole number"),
        (float, True, "key: True is not a number"),
        (float, "1", "key: '1' is not a number"),
        (float, None, "key: None is not a number"),
        (bool, 1, "key: 1 is not true or false"),
        (tuple[str, ...], "abc", "key: 'abc' is not a list"),
        (tuple[str, ...], {"a": 1}, "key: {'a': 1} is not a list"),
        (Sequence[str], "abc", "key: 'abc' is not a list"),
        (tuple[int, int], "ab", "key: 'ab' is not a list"),
        (tuple[int, int], [1, 2, 3], "key: [1, 2, 3] has 3 entries instead of 2"),
        (tuple[int, int], [1, "b"], "key[1]: 'b' is not a whole number"),
        (dict[str, int], [1], "key: [1] is not a table of keys"),
        (dict[str, int], {"a": "b"}, "key.a: 'b' is not a whole number"),
        (Steer, [1], "key: [1] is not a table of keys"),
        (Literal["cosine", "linear"], "cosin", "key: 'cosin' is none of: cosine, linear"),
        (Literal[1, 2], True, "key: True is none of: 1, 2"),
        (float | None, "x", "key: 'x' is not a number"),
        (int | str, [1], "key: [1] is not a whole number and [1] is not text"),
        (Ablate | str, 3, "key: 3 is not a table of keys and 3 is not text"),
        (Ablate | str, {"a": 1}, "key: it does not read as Ablate and {'a': 1} is not text"),
        (
            Ablate | Steer,
            None,
            "key: None is not a table of keys with a kind (ablate, push, steer)",
        ),
        (Ablate | Steer, {}, "key: the kind is missing (one of: ablate, push, steer)"),
        (
            Ablate | Steer | None,
            {"kind": "stear"},
            "key: unknown kind 'stear' (did you mean: steer?)",
        ),
        (Ablate | Steer, {"kind": ["steer"]}, "key: unknown kind ['steer'] (did you mean: steer?)"),
        (Ablate | Steer, {"kind": "steer", "dose": "x"}, "key.dose: 'x' is not a number"),
        (
            tuple[Ablate | Steer, ...],
            [{"kind": "steer"}, {"kind": "ablate"}],
            "key[1].features: missing",
        ),
    ],
)
def test_wrong_values_are_refused_in_words(wanted, value, said):
    assert refusal(wanted, value) == said


def test_a_long_value_is_shortened():
    assert len(refusal(int, list(range(1_000)))) < 80


def test_whole_numbers_are_numbers():
    dose = from_plain(Steer, {"dose": 2}).dose
    assert dose == 2.0
    assert isinstance(dose, float)


def test_a_union_takes_the_first_member_that_fits():
    assert accepted(int | str, 3) == 3
    assert accepted(int | str, "3") == "3"
    assert accepted(Ablate | str, "all") == "all"


def test_a_tag_chooses_its_dataclass():
    assert accepted(Ablate | Steer, {"kind": "push"}) == Steer(kind="push")
    assert accepted(Ablate | Steer | None, None) is None


def test_a_mapping_is_guarded_however_often_its_type_was_read():
    for _ in range(2):
        assert refusal(dict[str, bool], {"a": True, "b": 1}) == "key.b: 1 is not true or false"
        assert refusal(dict[str, bool], [1]) == "key: [1] is not a table of keys"
