import pytest
from hypothesis import given
from hypothesis import strategies as st

from visae.errors import ConfigError
from visae.training.choosing import Candidate, ChoiceRule, choose, front


def sae(name, nmse, l0, dead=0.0, dense=0.0):
    return Candidate(name=name, nmse=nmse, l0=l0, dead_share=dead, dense_share=dense)


SAES = [
    sae("coarse", 0.3, 8),
    sae("fine", 0.1, 64),
    sae("dead", 0.05, 16, dead=0.5),
    sae("dense", 0.15, 32, dense=0.2),
    sae("equal", 0.15, 32),
]


def test_the_lowest_error_of_those_with_few_dead_features_is_chosen():
    assert choose(SAES, ChoiceRule()) == "fine"
    assert choose(SAES, ChoiceRule(largest_dead_share=0.5)) == "dead"


def test_a_bound_on_l0_counts_those_at_the_bound():
    assert choose(SAES, ChoiceRule(largest_l0=64)) == "fine"
    assert choose(SAES, ChoiceRule(largest_l0=63.9)) == "dense"
    assert choose(SAES, ChoiceRule(largest_l0=31)) == "coarse"


def test_dense_features_can_be_bounded_and_the_first_of_equals_is_taken():
    assert choose(SAES, ChoiceRule(largest_l0=32, largest_dense_share=0.1)) == "equal"


def test_nothing_is_chosen_where_none_is_within_the_bounds():
    assert choose(SAES, ChoiceRule(largest_l0=2)) is None
    assert choose([], ChoiceRule()) is None


def test_the_rule_says_itself():
    assert ChoiceRule(largest_l0=32, largest_dense_share=0.01).text == (
        "the lowest NMSE of the SAEs with L0 at most 32, at most 0.05 of the features dead "
        "and at most 0.01 of them dense"
    )
    assert ChoiceRule().text == (
        "the lowest NMSE of the SAEs with at most 0.05 of the features dead"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"largest_l0": 0},
        {"largest_l0": float("nan")},
        {"largest_dead_share": 5},
        {"largest_dense_share": -0.1},
    ],
)
def test_a_bound_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ChoiceRule(**wrong)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(points):
    saes = [sae(str(i), float(nmse), float(l0)) for i, (nmse, l0) in enumerate(points)]
    found = front(saes)
    best = {}
    for nmse, l0 in points:
        best[l0] = min(nmse, best.get(l0, 99))
    for i, (nmse, l0) in enumerate(points):
        lower = [best[other] for other in best if other < l0]
        wanted = nmse == best[l0] and all(nmse < other for other in lower)
        assert (str(i) in found) == wanted
