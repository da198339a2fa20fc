import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.images.groups import column_names, join_groups

cells = st.none() | st.sampled_from("abcd")
tables = st.integers(0, 8).flatmap(
    lambda n: st.dictionaries(
        st.sampled_from(["patient", "site", "day"]),
        st.lists(cells, min_size=n, max_size=n),
        min_size=2,
    )
)


def naive(columns):
    """Sets of rows that share a value, merged until nothing changes."""
    n_images = len(next(iter(columns.values())))
    groups = [{row} for row in range(n_images)]
    for values in columns.values():
        for row, value in enumerate(values):
            for other in range(n_images):
                if value is not None and values[other] == value:
                    merged = groups[row] | groups[other]
                    for member in merged:
                        groups[member] = merged
    return groups


@given(tables)
def test_images_share_a_group_exactly_when_a_chain_of_values_joins_them(columns):
    found = join_groups(columns)
    for row, members in enumerate(naive(columns)):
        if all(values[row] is None for values in columns.values()):
            assert found[row] is None
        else:
            assert {i for i, name in enumerate(found) if name == found[row]} == members


@given(tables, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_the_order_of_images(columns, random):
    order = list(range(len(next(iter(columns.values())))))
    random.shuffle(order)
    shuffled = {name: [values[row] for row in order] for name, values in columns.items()}
    names = join_groups(columns)
    assert join_groups(shuffled) == [names[row] for row in order]


def test_a_group_has_the_first_of_its_values_as_name():
    columns = {"site": ["x", "y", None, None], "patient": ["p2", "p1", "p1", None]}
    assert join_groups(columns) == ["patient=p2", "patient=p1", "patient=p1", None]


def test_one_column_gives_its_values():
    assert join_groups({"patient": ["p", None, "q"]}) == ["p", None, "q"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ()), ("site", ("site",)), ("site,day", ("site", "day")), ("a,b", ("a,b",))],
)
def test_columns_are_named_with_commas_between(text, expected):
    assert column_names(text, ["site", "day", "a,b"]) == expected
