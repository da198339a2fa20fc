"""The verdict on one prediction: supported, refuted or inconclusive, in one sentence.

Supported needs three things: the whole interval beyond the smallest effect of interest, more
than chance over images gives, and more than control directions do. Refuted needs an interval,
with some width, that excludes an effect of that size. Everything else is inconclusive, with the
number of images that would have settled it. Source: RIGOR §6.

Main names: ``Prediction``, ``judge``, ``Verdict``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from visae.errors import ExperimentError
from visae.statistics.estimates import Estimate
from visae.statistics.power import images_to_settle
from visae.statistics.units import check_count, check_share

__all__ = ["Label", "Prediction", "Verdict", "judge"]

Label = Literal["supported", "refuted", "inconclusive"]
Place = Literal["beyond", "short", "across", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was predicted before the confirmation images were looked at."""

    direction: Literal["decrease", "increase"]
    """Which way the edit was to change the outcome."""
    smallest_effect: float
    """Smallest change worth calling an effect, in units of the outcome; 0 or more."""
    alpha: float = 0.05
    """Significance that the corrected p-values must be below."""
    family_size: int = 1
    """Tests in the family the p-values were corrected for."""

    def __post_init__(self) -> None:
        if not (self.smallest_effect >= 0 and math.isfinite(self.smallest_effect)):
            raise ExperimentError(
                f"smallest_effect is {self.smallest_effect}",
                where="prediction",
                fix="Give its size as a number of 0 or more; direction says which way it goes",
            )
        check_share(self.alpha, "alpha")
        check_count(self.family_size, 1, "family_size")

    @property
    def boundary(self) -> float:
        """The smallest effect of interest with its sign."""
        increase = self.direction == "increase"
        return self.smallest_effect if increase else 0.0 - self.smallest_effect

    def describe(self) -> str:
        """The effect of interest as a phrase."""
        size = f" of {self.smallest_effect:.3g} or more" if self.smallest_effect else ""
        return f"{'an' if self.direction == 'increase' else 'a'} {self.direction}{size}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an experiment says about its prediction."""

    label: Label
    """supported, refuted or inconclusive."""
    sentence: str
    """The verdict with its numbers, in one sentence."""
    reasons: tuple[str, ...]
    """Each condition and whether it held, as sentences."""
    n_images_for_80_power: int | None
    """Images that would have given 80 % power, were the effect as observed; None if conclusive,
    or if more images would not help."""


def judge(
    effect: Estimate, prediction: Prediction, *, paired_p: float, direction_p: float
) -> Verdict:
    """The verdict on a prediction.

    Args:
        effect: Mean over images of the edit's effect less the mean effect of its controls.
        prediction: What was predicted.
        paired_p: Corrected p-value of the paired permutation test.
        direction_p: Corrected p-value against the control directions.

    Raises:
        ExperimentError: on a p-value outside 0 to 1.
    """
    for name, p_value in (("paired_p", paired_p), ("direction_p", direction_p)):
        if not 0 <= p_value <= 1:
            raise ExperimentError(
                f"{name} is {p_value}", where=name, fix="Give a p-value between 0 and 1"
            )
    place, alpha = _place(effect, prediction), prediction.alpha
    reasons = (
        _interval_reason(effect, prediction, place),
        _p_reason("Chance over images", paired_p, alpha),
        _p_reason("Chance over control directions", direction_p, alpha),
    )
    label: Label = "inconclusive"
    if place == "beyond" and max(paired_p, direction_p) < alpha:
        label = "supported"
    elif place == "short":
        label = "refuted"
    images = None
    # An effect that other directions have too does not become special with more images.
    if label == "inconclusive" and not (place == "beyond" and direction_p >= alpha):
        images = _images(effect, prediction)
    change = f"relative to its controls the edit changes the outcome by {effect.describe()}"
    ending = (
        f"which cannot be judged: {effect.note}"
        if place == "unknown"
        else _ending(place, prediction, paired_p=paired_p, direction_p=direction_p)
    )
    sentence = f"{label.capitalize()}: {change}, {ending}{_remedy(images)}."
    return Verdict(label=label, sentence=sentence, reasons=reasons, n_images_for_80_power=images)


def _place(effect: Estimate, prediction: Prediction) -> Place:
    """Where the whole interval lies, seen from the boundary in the predicted direction."""
    if effect.interval is None:
        return "unknown"
    ends = (effect.interval.low, effect.interval.high)
    if prediction.direction == "decrease":
        ends = (-ends[1], -ends[0])
    if ends[0] > prediction.smallest_effect:
        return "beyond"
    if ends[1] >= prediction.smallest_effect:
        return "across"
    # Equal outcomes cannot exclude that a few images respond, and no p-value guards a refutation.
    return "short" if ends[0] < ends[1] else "unknown"


def _images(effect: Estimate, prediction: Prediction) -> int | None:
    """Images for 80 % power to place the effect, and to be significant in its family."""
    to_place = images_to_settle(effect, prediction.boundary)
    if to_place is None or effect.value is None:
        return None
    decrease = prediction.direction == "decrease"
    if effect.value > prediction.boundary if decrease else effect.value < prediction.boundary:
        return to_place
    alpha = prediction.alpha / prediction.family_size
    to_detect = images_to_settle(effect, 0.0, alpha=alpha)
    needed = max(to_place, to_detect or 0)
    # A test that fails although there are images enough lacks permutations, not images.
    return needed if needed > effect.n_images else None


def _interval_reason(effect: Estimate, prediction: Prediction, place: Place) -> str:
    verb = {
        "beyond": "lies wholly beyond",
        "short": "lies wholly short of",
        "across": "includes",
        "unknown": "cannot be compared with",
    }[place]
    note = f" ({effect.note})" if effect.note else ""
    return f"The interval {verb} the smallest effect of interest, {prediction.boundary:.3g}{note}"


def _p_reason(source: str, p_value: float, alpha: float) -> str:
    relation = "below" if p_value < alpha else "not below"
    verb = "does not explain" if p_value < alpha else "can explain"
    return f"{source} {verb} the effect: corrected p = {p_value:.2g}, {relation} {alpha:g}"


def _ending(place: Place, prediction: Prediction, *, paired_p: float, direction_p: float) -> str:
    """What the interval and the p-values say, as the clause that ends the sentence."""
    if place == "short":
        return f"which excludes {prediction.describe()}"
    if place == "across":
        return f"which neither shows nor excludes {prediction.describe()}"
    alpha, p_value = prediction.alpha, max(paired_p, direction_p)
    shown = f"which shows {prediction.describe()}"
    if p_value < alpha:
        return f"{shown}, with corrected p = {p_value:.2g} below {alpha:g}"
    source = "control directions do" if direction_p >= alpha else "chance over images does"
    return f"{shown}, but {source} as much (corrected p = {p_value:.2g}, not below {alpha:g})"


def _remedy(images: int | None) -> str:
    if images is None:
        return ""
    return (
        f"; if the true effect is the observed one, {images} images would settle it with 80 % power"
    )
