"""How reports say things: numbers, bands, flags and statistics in the same words everywhere."""

import math

from visae.features.record import Band
from visae.features.table import FeatureRow
from visae.statistics.estimates import Estimate

__all__ = [
    "BAND_TITLES",
    "FLAG_MEANINGS",
    "count",
    "estimated",
    "feature_facts",
    "fixed",
    "number",
    "percent",
    "plural",
    "preferred_class",
]

BAND_TITLES: dict[Band, tuple[str, tuple[str, ...]]] = {
    "top": ("Top", ("images of the", "largest maximum")),
    "upper": ("Upper", ("drawn from the", "strongest third", "of the others")),
    "middle": ("Middle", ("drawn from the", "middle third")),
    "low": ("Low", ("drawn from the", "weakest third")),
    "random_active": ("Random active", ("drawn from all", "images on which", "it fires")),
}
"""Title of each band, and what is in it, in short lines."""

FLAG_MEANINGS = {
    "dead": "never fires",
    "dense": "fires on more than 10 % of tokens",
    "position": "its place in the image alone explains over a quarter of its variance",
    "border": "fires mostly at the border of the image",
    "special": "fires mostly on special tokens",
}
"""What each flag means."""


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without needless zeros; n/a where there is none."""
    if value is None or math.isnan(value):
        return "n/a"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 9.997 is 10.0
    places = max(0, digits - 1 - exponent)
    return f"{value:,.{places}f}".replace(",", " ").replace("-", "−")


def estimated(estimate: Estimate) -> str:
    """A value with its interval, all three to the same decimals; n/a where there is none."""
    if estimate.value is None:
        return "n/a"
    if estimate.interval is None:
        return number(estimate.value)
    values = (estimate.value, estimate.interval.low, estimate.interval.high)
    largest = max(abs(value) for value in values)
    places = 2 - math.floor(math.log10(largest)) if largest > 0 else 0
    value, low, high = (f"{v:.{min(4, max(0, places))}f}".replace("-", "−") for v in values)
    return f"{value} ({low} to {high})"


def fixed(value: float | None) -> str:
    """A number to two decimals; n/a where there is none."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.2f}".replace("-", "−")


def count(value: int) -> str:
    """A whole number, in groups of three digits from five digits on."""
    return str(value) if value < 10_000 else f"{value:,}".replace(",", " ")


def percent(share: float | None) -> str:
    """A share as a percentage to two or three significant digits; n/a where there is none."""
    return "n/a" if share is None else f"{number(100 * share, 2 if share < 0.1 else 3)} %"


def plural(n: int, one: str, many: str = "") -> str:
    """A count with its word: 1 image, 2 images."""
    word = one if n == 1 else many or f"{one}s"
    return f"{count(n)} {word}"


def preferred_class(row: FeatureRow) -> str:
    """The class a feature prefers, with lift and count, as a phrase."""
    if row.best_class is None:
        return "no class stands out"
    lift = number(row.best_class_lift, 2)
    return f"{row.best_class} {lift}× ({row.best_class_count} images)"


def feature_facts(row: FeatureRow, n_images: int) -> list[tuple[str, str]]:
    """The statistics of a feature that every sheet shows: (what, value)."""
    return [
        ("density", percent(row.density)),
        ("images", f"{count(row.n_images_active)} of {count(n_images)}"),
        ("q99", number(row.q99)),
        ("max", number(row.max)),
        ("best class (lift)", preferred_class(row)),
        ("entropy", "n/a" if row.label_entropy is None else f"{fixed(row.label_entropy)} bits"),
        ("position R²", fixed(row.position_r2)),
        ("flags", ", ".join(row.flags) or "none"),
    ]
