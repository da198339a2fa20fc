import numpy as np
import pytest

from visae.errors import ExperimentError
from visae.statistics.units import check_count, check_finite, check_share, sample_units


def test_without_groups_every_image_is_a_unit() -> None:
    sample = sample_units(np.array([1, 2, 6]), None)
    assert sample.values.dtype == np.float64
    assert sample.units.tolist() == [0, 1, 2]
    assert sample.sizes.tolist() == [1, 1, 1]
    assert sample.mean == 3.0
    assert sample.centred.tolist() == [-2, -1, 3]


def test_groups_are_units_and_none_is_a_unit_of_its_own() -> None:
    sample = sample_units(np.array([1.0, 2, 4, 8, 16]), ["b", None, "a", "b", None])
    assert sample.units.tolist() == [0, 1, 2, 0, 3]
    assert sample.sizes.tolist() == [2, 1, 1, 1]
    assert sample.sum_by_unit(sample.values).tolist() == [9, 2, 4, 16]


@pytest.mark.parametrize(
    ("values", "groups", "words"),
    [
        ([], None, "0 independent units"),
        ([1.0], None, "1 independent unit cannot"),
        ([1.0, 2.0, 3.0], ["a", "a", "a"], "1 independent unit cannot"),
        ([1.0, np.nan, 3.0], None, r"1 of 3 outcomes are not finite numbers \(first at \(1,\)\)"),
        ([1.0, np.inf], None, "not finite"),
        ([1.0, 2.0, 3.0], ["a", "b"], "3 images have 2 groups"),
    ],
)
def test_refuses_what_cannot_be_analysed(
    values: list[float], groups: list[str] | None, words: str
) -> None:
    with pytest.raises(ExperimentError, match=words) as raised:
        sample_units(np.array(values, dtype=np.float64), groups)
    assert raised.value.where
    assert raised.value.fix


def test_refuses_more_than_one_value_per_image() -> None:
    with pytest.raises(ExperimentError, match=r"shape \(3, 2\)"):
        sample_units(np.zeros((3, 2)), None)


def test_checks_name_what_they_refuse() -> None:
    with pytest.raises(ExperimentError, match="draws is 0"):
        check_count(0, 1, "draws")
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ExperimentError, match="alpha"):
            check_share(share, "alpha")
    with pytest.raises(ExperimentError, match=r"2 of 4 doses.*\(0, 1\)"):
        check_finite(np.array([[0.0, np.nan], [np.inf, 1.0]]), "doses")
