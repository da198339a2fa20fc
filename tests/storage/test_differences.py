import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.storage.differences import differences

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["b: 2 there, 3 now"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["a.b[1]: 2 there, 3 now"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] there, [1, 2] now"]),
        ({"a": 1}, {}, ["a: 1 there, nothing now"]),
        ({}, {"a": "x"}, ["a: nothing there, 'x' now"]),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2}, ["a: 1 there, 2 now", "b: 1 there, 2 now"]),
        ({"a": {"b": 1}}, {"a": 2}, ["a: {'b': 1} there, 2 now"]),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_each_leaf_that_differs_is_named(old, new, texts):
    assert differences(old, new) == texts


def test_the_time_of_the_old_value_can_be_said():
    assert differences({"a": 1}, {"a": 2}, then="then") == ["a: 1 then, 2 now"]


def test_long_values_are_cut():
    (text,) = differences({"a": "x" * 500}, {"a": "y" * 500})
    assert len(text) < 100


def test_long_texts_with_equal_ends_are_shown_where_they_differ():
    old = "seg:/data/of/the/laboratory/street?ignore=11&split=val"
    new = "seg:/data/of/the/laboratory/street?classes=names.csv&ignore=11&split=val"
    (text,) = differences({"images": old}, {"images": new})
    assert text == (
        "images: '…/street?ignore=11&split=val' there, '…/street?classes=names.csv&ignore…' now"
    )


@given(PLAIN, PLAIN)
def test_nothing_differs_just_when_they_are_equal(old, new):
    assert differences(old, old) == []
    assert bool(differences(old, new)) == (old != new)
