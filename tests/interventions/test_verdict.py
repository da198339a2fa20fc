import math
import re

import pytest

from visae.errors import ExperimentError
from visae.interventions.verdict import Prediction, Verdict, judge
from visae.statistics.estimates import Estimate, Interval
from visae.statistics.power import images_needed

DECREASE = Prediction(direction="decrease", smallest_effect=0.05)
INCREASE = Prediction(direction="increase", smallest_effect=0.05)


def effect(value: float, low: float, high: float, images: int = 100) -> Estimate:
    interval = Interval(low=low, high=high, level=0.95)
    return Estimate(value=value, interval=interval, n_images=images, n_units=images)


def decide(
    estimate: Estimate,
    prediction: Prediction = DECREASE,
    paired: float = 0.001,
    other: float = 0.01,
) -> Verdict:
    return judge(estimate, prediction, paired_p=paired, direction_p=other)


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [
        (-0.20, -0.06, "supported"),
        (-0.20, -0.05, "inconclusive"),  # touches the smallest effect
        (-0.20, -0.01, "inconclusive"),  # excludes zero, not the smallest effect
        (-0.20, 0.10, "inconclusive"),
        (-0.05, 0.10, "inconclusive"),
        (-0.04, 0.10, "refuted"),
        (-0.04, -0.01, "refuted"),  # real but too small
        (0.06, 0.20, "refuted"),  # the other way
    ],
)
def test_the_interval_decides_and_directions_mirror(low: float, high: float, label: str) -> None:
    middle = (low + high) / 2
    assert decide(effect(middle, low, high)).label == label
    assert decide(effect(-middle, -high, -low), INCREASE).label == label


@pytest.mark.parametrize("p_values", [(0.05, 0.01), (0.01, 0.05), (0.2, 0.3)])
def test_support_needs_both_p_values_below_alpha(p_values: tuple[float, float]) -> None:
    strong = effect(-0.13, -0.20, -0.06)
    assert decide(strong, paired=0.049, other=0.049).label == "supported"
    assert decide(strong, paired=p_values[0], other=p_values[1]).label == "inconclusive"


def test_refutation_does_not_wait_for_p_values() -> None:
    assert decide(effect(0.0, -0.02, 0.02), paired=0.9, other=0.9).label == "refuted"


def test_alpha_is_that_of_the_prediction() -> None:
    strict = Prediction(direction="decrease", smallest_effect=0.05, alpha=0.005)
    strong = effect(-0.13, -0.20, -0.06)
    assert decide(strong, strict, paired=0.004, other=0.004).label == "supported"
    assert decide(strong, strict, paired=0.004, other=0.01).label == "inconclusive"


def test_without_a_smallest_effect_zero_is_the_boundary() -> None:
    any_decrease = Prediction(direction="decrease", smallest_effect=0.0)
    assert decide(effect(-0.1, -0.19, -0.01), any_decrease).label == "supported"
    assert decide(effect(0.1, 0.01, 0.19), any_decrease).label == "refuted"
    nothing = decide(effect(0.0, 0.0, 0.0), any_decrease)
    assert (nothing.label, nothing.n_images_for_80_power) == ("inconclusive", None)
    assert "-0" not in nothing.reasons[0]


def test_the_supported_sentence() -> None:
    verdict = decide(effect(-0.13, -0.20, -0.06), paired=0.0004, other=0.0099)
    assert verdict.sentence == (
        "Supported: relative to its controls the edit changes the outcome by -0.13 "
        "(95 % interval -0.2 to -0.06, 100 images), which shows a decrease of 0.05 or more, "
        "with corrected p = 0.0099 below 0.05."
    )
    assert verdict.reasons == (
        "The interval lies wholly beyond the smallest effect of interest, -0.05",
        "Chance over images does not explain the effect: corrected p = 0.0004, below 0.05",
        (
            "Chance over control directions does not explain the effect: "
            "corrected p = 0.0099, below 0.05"
        ),
    )
    assert verdict.n_images_for_80_power is None


def test_the_refuted_sentence() -> None:
    verdict = decide(
        effect(0.01, -0.04, 0.06),
        paired=0.6,
        other=0.4,
    )
    assert verdict.sentence == (
        "Refuted: relative to its controls the edit changes the outcome by 0.01 "
        "(95 % interval -0.04 to 0.06, 100 images), which excludes a decrease of 0.05 or more."
    )
    assert "can explain the effect: corrected p = 0.6, not below 0.05" in verdict.reasons[1]
    assert verdict.n_images_for_80_power is None


def t_effect(value: float, images: int) -> Estimate:
    """An estimate with standard deviation 1."""
    from scipy import stats

    half = stats.t.isf(0.025, images - 1) / math.sqrt(images)
    return effect(value, value - half, value + half, images)


def test_inconclusive_names_the_images_that_would_settle_it() -> None:
    """The distance from −0.7 to the smallest effect −0.2 is half a standard deviation."""
    prediction = Prediction(direction="decrease", smallest_effect=0.2)
    verdict = decide(t_effect(-0.7, 12), prediction)
    assert verdict.label == "inconclusive"
    assert verdict.n_images_for_80_power == 34
    assert "neither shows nor excludes a decrease of 0.2 or more" in verdict.sentence
    assert "34 images would settle it with 80 % power" in verdict.sentence
    short = decide(t_effect(0.3, 12), Prediction(direction="increase", smallest_effect=0.8))
    assert (short.label, short.n_images_for_80_power) == ("inconclusive", 34)


def test_inconclusive_by_p_counts_images_for_the_whole_family() -> None:
    prediction = Prediction(direction="increase", smallest_effect=0.0, family_size=100)
    verdict = decide(t_effect(0.5, 20), prediction, paired=0.4)
    assert verdict.label == "inconclusive"
    assert verdict.n_images_for_80_power == images_needed(0.5, alpha=0.0005)
    assert "chance over images does as much (corrected p = 0.4, not below 0.05)" in verdict.sentence


def test_a_p_that_no_number_of_images_explains_gets_none() -> None:
    """200 images are plenty for this effect: what was lacking are permutations."""
    verdict = decide(t_effect(0.5, 200), INCREASE, paired=0.1)
    assert (verdict.label, verdict.n_images_for_80_power) == ("inconclusive", None)


def test_images_do_not_help_where_control_directions_do_as_much() -> None:
    verdict = decide(effect(-0.13, -0.20, -0.06), other=0.3)
    assert verdict.n_images_for_80_power is None
    assert "but control directions do as much (corrected p = 0.3" in verdict.sentence
    assert "images would settle" not in verdict.sentence


def test_equal_outcomes_can_support_but_not_refute() -> None:
    """20 images without a response do not exclude that 5 % of images respond."""
    assert decide(effect(-1.0, -1.0, -1.0)).label == "supported"
    none = Interval(low=0.0, high=0.0, level=0.95)
    equal = Estimate(value=0.0, interval=none, n_images=20, n_units=20, note="all the same")
    verdict = decide(equal, paired=1.0, other=1.0)
    assert (verdict.label, verdict.n_images_for_80_power) == ("inconclusive", None)
    assert "which cannot be judged: all the same." in verdict.sentence


def test_an_effect_without_interval_is_inconclusive_and_says_why() -> None:
    few = Estimate(value=-0.3, interval=None, n_images=4, n_units=4, note="4 units are too few")
    verdict = decide(few)
    assert (verdict.label, verdict.n_images_for_80_power) == ("inconclusive", None)
    assert verdict.sentence.endswith("which cannot be judged: 4 units are too few.")
    assert "(4 units are too few)" in verdict.reasons[0]


def test_every_verdict_is_one_sentence_with_numbers() -> None:
    estimates = [effect(v, v - 0.1, v + 0.1) for v in (-0.3, -0.1, 0.0, 0.1, 0.3)]
    for estimate in estimates:
        for other in (0.01, 0.5):
            sentence = decide(estimate, other=other).sentence
            assert re.fullmatch(r"(Supported|Refuted|Inconclusive): .*[^.]\.", sentence)
            assert "95 % interval" in sentence
            assert sentence.count(". ") == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"direction": "decrease", "smallest_effect": -0.1}, "smallest_effect is -0.1"),
        ({"direction": "decrease", "smallest_effect": math.nan}, "smallest_effect is nan"),
        ({"direction": "decrease", "smallest_effect": 0.1, "alpha": 5.0}, "alpha is 5"),
        ({"direction": "decrease", "smallest_effect": 0.1, "family_size": 0}, "family_size"),
    ],
)
def test_a_prediction_is_checked(settings: dict, words: str) -> None:
    with pytest.raises(ExperimentError, match=words):
        Prediction(**settings)


@pytest.mark.parametrize("p_value", [-0.1, 1.5, math.nan])
def test_p_values_are_checked(p_value: float) -> None:
    with pytest.raises(ExperimentError, match="paired_p"):
        decide(effect(0.1, 0.0, 0.2), paired=p_value)
    with pytest.raises(ExperimentError, match="direction_p"):
        decide(effect(0.1, 0.0, 0.2), other=p_value)
