import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from visae.errors import ExperimentError
from visae.statistics.significance import (
    Alternative,
    Correction,
    correct,
    direction_null,
    draws_needed,
    paired_permutation,
    reach_problem,
    smallest_reachable_p,
)

RNG = np.random.default_rng(21)
ALTERNATIVES: list[Alternative] = ["less", "greater", "two-sided"]


def naive_exact_p(differences: np.ndarray, groups: list[int], alternative: str) -> float:
    """Every sign pattern in turn, whole groups flipped."""
    observed = differences.mean()
    hits = total = 0
    for signs in itertools.product([1, -1], repeat=max(groups) + 1):
        flipped = np.mean([signs[g] * d for g, d in zip(groups, differences, strict=True)])
        total += 1
        hits += {
            "greater": flipped >= observed - 1e-12,
            "less": flipped <= observed + 1e-12,
            "two-sided": abs(flipped) >= abs(observed) - 1e-12,
        }[alternative]
    return hits / total


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_few_units_are_enumerated(alternative: Alternative) -> None:
    differences = RNG.normal(0.4, 1.0, 9)
    found = paired_permutation(differences, alternative=alternative, seed=1)
    assert found.n_permutations == 512
    assert found.statistic == pytest.approx(differences.mean())
    assert found.p_value == naive_exact_p(differences, list(range(9)), alternative)
    assert found.smallest_p == (2 if alternative == "two-sided" else 1) / 512


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_whole_groups_are_flipped(alternative: Alternative) -> None:
    groups = [0, 1, 1, 2, 3, 3, 3, 4, 5, 0, 2]
    differences = RNG.normal(0.4, 1.0, 11)
    found = paired_permutation(differences, groups=groups, alternative=alternative, seed=1)
    assert found.n_permutations == 64
    assert found.p_value == naive_exact_p(differences, groups, alternative)


@pytest.mark.parametrize("alternative", ["less", "greater"])
def test_one_sided_enumeration_agrees_with_scipy(alternative: Alternative) -> None:
    differences = RNG.normal(0.3, 1.0, 10)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative=alternative
    )
    found = paired_permutation(differences, alternative=alternative, seed=1)
    assert found.p_value == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_random_flips_approach_the_enumeration(alternative: Alternative) -> None:
    differences = RNG.normal(0.4, 1.0, 12)
    exact = paired_permutation(differences, alternative=alternative, seed=1)
    drawn = paired_permutation(differences, alternative=alternative, n_permutations=4000, seed=1)
    assert (exact.n_permutations, drawn.n_permutations) == (4096, 4000)
    error = np.sqrt(exact.p_value * (1 - exact.p_value) / 4000)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * error + 1 / 4001)
    assert drawn.smallest_p == 1 / 4001


def test_random_flips_agree_with_scipy_on_many_images() -> None:
    differences = RNG.exponential(size=200) - 0.9
    expected = stats.permutation_test(
        (differences,),
        lambda values, axis: np.abs(values.mean(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=4000,
        vectorized=True,
        rng=1,
    )
    found = paired_permutation(differences, seed=1)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.03)


def test_many_images_are_flipped_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visae.statistics.significance._CHUNK", 1000)
    differences = RNG.normal(0.3, 1.0, 60)
    found = paired_permutation(differences, alternative="greater", n_permutations=3000, seed=1)
    expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    assert found.n_permutations == 3000
    assert found.p_value == pytest.approx(expected, abs=0.02)


def test_a_strong_effect_reaches_the_smallest_p_and_never_zero() -> None:
    found = paired_permutation(np.full(40, 0.2), n_permutations=999, seed=1)
    assert found.p_value == found.smallest_p == 1 / 1000


def test_rounding_does_not_hide_ties() -> None:
    """Sums of 0.1, 0.2, 0.3 in another order differ in the last bit; they are still ties."""
    found = paired_permutation(np.array([0.1, 0.2, -0.3, 0.1, 0.2, -0.3]), seed=1)
    assert found.p_value == 1.0
    assert paired_permutation(np.zeros(30), seed=1).p_value == 1.0


@settings(deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=2, max_size=7),
    st.integers(0, 5),
    st.sampled_from(ALTERNATIVES),
)
def test_p_is_a_probability_and_mirrors(values: list[int], seed: int, alternative: str) -> None:
    differences = np.array(values, dtype=np.float64)
    mirrored = {"less": "greater", "greater": "less", "two-sided": "two-sided"}[alternative]
    one = paired_permutation(differences, alternative=alternative, seed=seed)
    other = paired_permutation(-differences, alternative=mirrored, seed=seed)
    assert one.smallest_p / 2 < one.p_value <= 1
    assert one.p_value == other.p_value


def test_the_seed_fixes_the_p_value() -> None:
    differences = RNG.normal(0.2, 1.0, 50)
    first = paired_permutation(differences, n_permutations=500, seed=1)
    assert paired_permutation(differences, n_permutations=500, seed=1) == first
    others = {paired_permutation(differences, n_permutations=500, seed=k).p_value for k in range(5)}
    assert len(others) > 1


def test_permutation_refuses_bad_input() -> None:
    with pytest.raises(ExperimentError, match="1 independent unit"):
        paired_permutation(np.ones(4), groups=["a"] * 4, seed=1)
    with pytest.raises(ExperimentError, match="n_permutations is 0"):
        paired_permutation(np.ones(4), n_permutations=0, seed=1)
    with pytest.raises(ExperimentError, match="not finite"):
        paired_permutation(np.array([1.0, np.nan]), seed=1)


def test_direction_null_counts_the_directions_that_do_as_much() -> None:
    null = np.array([0.1, 0.2, 0.3, 0.4])
    greater = direction_null(0.3, null, alternative="greater")
    assert greater.p_value == pytest.approx((1 + 2) / (1 + 4))
    assert direction_null(0.3, null, alternative="less").p_value == pytest.approx((1 + 3) / (1 + 4))
    assert direction_null(0.5, null, alternative="greater").p_value == 1 / 5
    assert direction_null(0.5, null, alternative="less").p_value == 1.0
    assert (greater.statistic, greater.n_permutations, greater.smallest_p) == (0.3, 4, 0.2)


def test_direction_null_two_sided_does_not_assume_a_null_around_zero() -> None:
    null = np.linspace(-0.3, -0.2, 99)
    found = direction_null(0.1, null, alternative="two-sided")
    assert found.p_value == found.smallest_p == 2 / 100
    assert direction_null(-0.25, null, alternative="two-sided").p_value == 1.0


def test_direction_null_counts_ties_up_to_rounding() -> None:
    assert direction_null(0.3, np.array([0.1 + 0.2]), alternative="less").p_value == 1.0
    assert direction_null(0.1 + 0.2, np.array([0.3]), alternative="greater").p_value == 1.0


def test_direction_null_refuses_bad_input() -> None:
    with pytest.raises(ExperimentError, match="control directions is 0"):
        direction_null(0.1, np.array([], dtype=np.float64), alternative="less")
    for effect, null in ((np.nan, [0.1]), (0.1, [np.nan])):
        with pytest.raises(ExperimentError, match="not finite"):
            direction_null(float(effect), np.array(null), alternative="less")


def naive_step_up(p: np.ndarray, penalty: float) -> np.ndarray:
    """Benjamini–Hochberg's adjusted p by its definition: min over ranks at or above one's own."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    for position, index in enumerate(order):
        later = [penalty * len(p) * p[order[k]] / (k + 1) for k in range(position, len(p))]
        adjusted[index] = min(1.0, *later)
    return adjusted


def naive_correction(p: np.ndarray, method: str) -> np.ndarray:
    harmonic = sum(1 / k for k in range(1, len(p) + 1))
    if method == "bonferroni":
        return np.array([min(1.0, value * len(p)) for value in p])
    return {"none": p, "bh": naive_step_up(p, 1.0), "by": naive_step_up(p, harmonic)}[method]


@pytest.mark.parametrize("method", ["bh", "by", "bonferroni", "none"])
@pytest.mark.parametrize("absent", [0, 40])
def test_correction_is_its_definition_over_the_whole_family(
    method: Correction, absent: int
) -> None:
    p = np.array([0.3, 0.001, 0.02, 0.02, 0.9, 0.0004])
    family = np.concatenate([p, np.ones(absent)])
    found = correct(p, method=method, family_size=len(family))
    assert found == pytest.approx(naive_correction(family, method)[:6])
    if absent == 0:
        assert (correct(p, method=method) == found).all()


def test_one_p_from_a_large_search_is_multiplied() -> None:
    assert correct(np.array([1e-5]), method="bh", family_size=1000) == pytest.approx([0.01])
    assert correct(np.array([1e-5]), method="bonferroni", family_size=1000) == pytest.approx([0.01])


@pytest.mark.parametrize(
    ("p", "family_size", "words"),
    [
        ([], None, "number of p-values is 0"),
        ([0.1, 0.2], 1, "family_size is 1"),
        ([0.1, 1.2], None, "not between 0 and 1"),
        ([0.1, -0.2], None, "not between 0 and 1"),
        ([0.1, np.nan], None, "not between 0 and 1"),
    ],
)
def test_correction_refuses(p: list[float], family_size: int | None, words: str) -> None:
    with pytest.raises(ExperimentError, match=words):
        correct(np.array(p, dtype=np.float64), method="bh", family_size=family_size)


@settings(deadline=None)
@given(st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.3]), st.integers(1, 5000))
def test_the_draws_needed_are_enough_and_no_more_than_the_rule(alpha: float, tests: int) -> None:
    draws = draws_needed(alpha, tests)
    assert smallest_reachable_p(draws) * tests < alpha
    assert draws - 1 < tests / alpha <= draws * (1 + 1e-9)
    assert reach_problem(draws, alpha=alpha, n_tests=tests) is None
    if draws > 1:
        assert reach_problem(draws - 1, alpha=alpha, n_tests=tests) is not None


def test_known_numbers_of_draws() -> None:
    assert smallest_reachable_p(999) == 0.001
    assert draws_needed(0.05) == 20
    assert draws_needed(0.05, 3) == 60
    assert draws_needed(0.001) == 1000


def test_reach_problem_says_what_to_do() -> None:
    text = reach_problem(100, alpha=0.05, n_tests=24)
    assert text is not None
    assert "100 draws give no p below 0.0099" in text
    assert "24 tests" in text
    assert "at least 480" in text
    assert "for one test" in str(reach_problem(10, alpha=0.05))


def test_counts_and_shares_are_checked() -> None:
    with pytest.raises(ExperimentError, match="number of draws"):
        smallest_reachable_p(0)
    with pytest.raises(ExperimentError, match="alpha"):
        draws_needed(5.0)
    with pytest.raises(ExperimentError, match="number of tests"):
        draws_needed(0.05, 0)
