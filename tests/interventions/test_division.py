"""Which images are for what, and what counts as one of them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError, ExperimentError
from visae.images.catalog import ImageTable
from visae.images.splits import split_of
from visae.interventions.division import (
    count_units,
    divide_images,
    image_units,
    learnable_classes,
    spread_evenly,
)
from visae.interventions.spec import OutcomeConfig, SplitConfig


def table(labels, *, groups=None, content=None):
    n = len(labels)
    return ImageTable(
        content_ids=tuple(content or (f"{i:064x}" for i in range(n))),
        refs=tuple(str(i) for i in range(n)),
        labels=tuple(labels),
        groups=tuple(groups or [None] * n),
    )


def divide(images, *, share=0.5, class_name="a", n_other=30):
    outcome = OutcomeConfig(class_name=class_name, n_per_other_class=n_other)
    return divide_images(images, SplitConfig(confirmation_share=share), outcome)


def test_sides_are_those_of_the_content_and_everything_has_one_place():
    images = table(["a", "b", "c", None] * 30)
    found = divide(images, n_other=4)
    assert sorted(found.discovery + found.confirmation) == list(range(120))
    for row in found.confirmation:
        assert split_of(images.content_ids[row]) == "confirmation"
    assert found.target == [row for row in found.confirmation if images.labels[row] == "a"]
    assert set(found.others) == {"b", "c"}
    for name, rows in found.others.items():
        assert len(rows) == 4
        assert {images.labels[row] for row in rows} == {name}
        assert set(rows) <= set(found.confirmation)


def test_groups_stay_on_one_side():
    groups = [f"patient {i // 6}" for i in range(120)]
    images = table(["a", "b"] * 60, groups=groups)
    found = divide(images)
    there = {groups[row] for row in found.discovery} & {groups[row] for row in found.confirmation}
    assert there == set()


def test_an_empty_side_is_refused():
    with pytest.raises(ExperimentError, match="0 confirmation") as caught:
        divide(table(["a", "b"] * 6, groups=["one"] * 12))
    assert caught.value.where == "split"


def test_equal_images_in_groups_of_both_sides_are_refused():
    groups = [f"g{i}" for i in range(40)]
    sides = [split_of(f"group:{g}") for g in groups]
    content = [f"{i:064x}" for i in range(40)]
    content[sides.index("discovery")] = content[sides.index("confirmation")] = "f" * 64
    with pytest.raises(ConfigError, match="same image occurs in two groups"):
        divide(table(["a", "b"] * 20, groups=groups, content=content))


def test_a_class_that_no_probe_can_learn_is_refused():
    labels = ["a", "b"] * 30
    discovery = divide(table(labels)).discovery
    few = [row for row in discovery if labels[row] == "a"][:4]
    labels = ["a" if row in few else "b" for row in range(60)]
    with pytest.raises(ExperimentError, match="Class a has 4 discovery images") as caught:
        divide(table(labels))
    assert caught.value.where == "outcome.class_name"
    with pytest.raises(ExperimentError, match="No discovery image has the label aa") as caught:
        divide(table(["a", "b"] * 30), class_name="aa")
    assert caught.value.fix.startswith("Use one of: a")


def test_a_small_class_is_left_out_of_everything():
    labels = ["a", "b"] * 30 + ["rare"] * 3
    found = divide(table(labels))
    assert set(found.others) == {"b"}
    assert learnable_classes(table(labels), range(63)) == ["a", "b"]


def test_too_few_independent_confirmation_images_are_refused():
    """A group, and an image that was given twice, count as one."""
    sides = [split_of(f"{i:064x}") for i in range(40)]
    first = sides.index("confirmation")
    labels = ["a" if side == "discovery" else "b" for side in sides]
    labels[first] = "a"
    with pytest.raises(ExperimentError, match="There are 1 confirmation images of a, 1 of them"):
        divide(table(labels))
    content = [f"{i:064x}" for i in range(40)] + [f"{first:064x}"] * 5
    with pytest.raises(ExperimentError, match="There are 6 confirmation images of a, 1 of them"):
        divide(table([*labels, *"aaaaa"], content=content))


def test_other_classes_of_one_unit_are_left_out():
    groups = [None] * 60
    sides = [split_of(f"{i:064x}") for i in range(60)]
    labels = ["a", "b"] * 30
    group = next(f"g{i}" for i in range(99) if split_of(f"group:g{i}") == "confirmation")
    for row, side in enumerate(sides):
        if labels[row] == "b" and side == "confirmation":
            groups[row] = group
    found = divide(table(labels, groups=groups))
    assert found.others == {}
    assert len(found.target) > 1


def test_units():
    images = table("abcde", groups=["x", None, "x", None, None], content=["1", "2", "3", "2", "x"])
    units = image_units(images, range(5))
    assert units == ["group x", "image 2", "group x", "image 2", "image x"]
    assert count_units(images, range(5)) == 3
    assert count_units(images, []) == 0


@given(st.integers(0, 200), st.integers(0, 200))
def test_an_even_sample(n_rows, limit):
    rows = list(range(100, 100 + n_rows))
    found = spread_evenly(rows, limit)
    assert len(found) == min(n_rows, limit)
    assert found == sorted(set(found))
    assert set(found) <= set(rows)
    if len(found) > 1:
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
