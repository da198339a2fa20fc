"""What the sums say of each feature: density, label entropy, classes, position, border, flags.

All of it describes the indexed images and proves nothing: a feature looked up here because of its
lift has been selected, and is confirmed on other images (RIGOR §5).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from visae.features.places import TokenPlaces
from visae.features.sums import FeatureSums

__all__ = [
    "DENSE",
    "N_CLASSES_KEPT",
    "POSITION_BOUND",
    "ClassAssociations",
    "border_lift",
    "class_associations",
    "flags",
    "label_entropy",
    "position_r2",
    "special_share",
]

DENSE = 0.1
"""A feature that fires on a larger share of tokens is flagged ``dense``."""
POSITION_BOUND = 0.25
"""A feature of larger R² from patch position alone is flagged ``position``."""
N_CLASSES_KEPT = 5
"""Classes kept for each feature."""

_FEWEST_IMAGES = 3
_FEWEST_PATCHES = 20
_Z = 1.959963984540054


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAssociations:
    """The classes that each feature prefers, best first."""

    classes: Int64[np.ndarray, "feature rank"]
    """Number of the class; −1 where there are fewer."""
    lifts: Float64[np.ndarray, "feature rank"]
    """P(class | the feature fires on the image) / P(class)."""
    counts: Int64[np.ndarray, "feature rank"]
    """Images of the class on which the feature fires."""


def label_entropy(sums: FeatureSums) -> Float64[np.ndarray, " feature"]:
    """Entropy of the classes of the images on which a feature fires, in bits; NaN without any.

    H = −Σ_c p_c log₂ p_c with p_c the share of class c in the sum of the feature's image maxima
    (2412.05276). 0 is one class alone, log₂(classes) all alike.
    """
    weight = sums.class_weight.numpy()
    total = weight.sum(1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    entropy: np.ndarray = np.abs((share * logs).sum(1))
    return np.where(total[:, 0] > 0, entropy, np.nan)


def class_associations(
    sums: FeatureSums, class_totals: Int64[np.ndarray, " class"]
) -> ClassAssociations:
    """The classes over-represented among the images on which each feature fires.

    They are ranked by the lower end of Wilson's 95 % interval of the lift, so that three images
    out of three do not beat ninety out of a hundred. Left out are classes with fewer than 3 such
    images, and those whose interval reaches down to 1.
    """
    counts = sums.class_images.numpy()
    n_active = counts.sum(1, keepdims=True)
    prior = class_totals / max(1, class_totals.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        lifts = counts / n_active / prior
        lower = _wilson_lower(counts, n_active) / prior
    eligible = (counts >= _FEWEST_IMAGES) & (lower > 1.0)
    score = np.where(eligible, lower, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")[:, :N_CLASSES_KEPT]
    kept = np.take_along_axis(eligible, order, 1)
    return ClassAssociations(
        classes=np.where(kept, order, -1),
        lifts=np.where(kept, np.take_along_axis(lifts, order, 1), np.nan),
        counts=np.where(kept, np.take_along_axis(counts, order, 1), 0),
    )


def position_r2(sums: FeatureSums, places: TokenPlaces) -> Float64[np.ndarray, " feature"]:
    """Share of the variance of a feature over patches that patch position alone explains.

    R² = Σ_p n (ā_p − ā)² / Σ (a − ā)², zeros included; NaN for a feature that never varies. By
    chance alone about (patches − 1) / (images × patches − 1).
    """
    if places.n_patches == 0:
        return np.full(sums.total.shape[0], np.nan)
    position_mean = sums.position_total.numpy() / sums.n_images
    mean = position_mean.mean(1)
    n_patches = sums.n_images * places.n_patches
    variance = sums.patch_square_total.numpy() / n_patches - mean**2
    between = position_mean.var(1)
    varies = variance > 1e-12 * mean**2
    r2: np.ndarray = np.divide(between, variance, out=np.full_like(mean, np.nan), where=varies)
    return r2


def border_lift(sums: FeatureSums, places: TokenPlaces) -> Float64[np.ndarray, " feature"]:
    """Share of a feature's active patches that lie at the border, over the share of all patches.

    NaN for a feature that fires on no patch, and for all where every patch lies at the border.
    """
    active = (sums.n_tokens_active - sums.n_special_active).numpy()
    share = _border_share(places)
    if not 0.0 < share < 1.0:
        return np.full(active.shape, np.nan)
    at_border = sums.n_border_active.numpy() / share
    lift: np.ndarray = np.full(active.shape, np.nan)
    np.divide(at_border, active, out=lift, where=active > 0)
    return lift


def special_share(sums: FeatureSums, places: TokenPlaces) -> Float64[np.ndarray, " feature"]:
    """Share of the tokens at which a feature fires that are special tokens.

    NaN for a feature that never fires, and for all where no special tokens were encoded.
    """
    n_active = sums.n_tokens_active.numpy()
    known = (n_active > 0) & (places.n_special > 0)
    share: np.ndarray = np.full(n_active.shape, np.nan)
    np.divide(sums.n_special_active.numpy(), n_active, out=share, where=known)
    return share


def flags(sums: FeatureSums, places: TokenPlaces) -> dict[str, Bool[np.ndarray, " feature"]]:
    """Which features deserve suspicion, and why.

    ``dead``: never fires. ``dense``: fires on more than 10 % of tokens. ``position``: patch
    position alone explains more than a quarter of its variance. ``border``: the share of its
    active patches that lie at the border is more than halfway from chance to all. ``special``: more
    than half of the tokens at which it fires are special tokens. Place is judged from 20 active
    patches on.
    """
    n_active = sums.n_tokens_active.numpy()
    is_judged = n_active - sums.n_special_active.numpy() >= _FEWEST_PATCHES
    share = _border_share(places)
    at_border = np.nan_to_num(border_lift(sums, places)) * share
    at_special = np.nan_to_num(special_share(sums, places)) > 0.5
    return {
        "dead": n_active == 0,
        "dense": n_active > DENSE * sums.n_tokens,
        "position": is_judged & (np.nan_to_num(position_r2(sums, places)) > POSITION_BOUND),
        "border": is_judged & (at_border > (1.0 + share) / 2),
        "special": at_special & (places.n_patches > 0),
    }


def _border_share(places: TokenPlaces) -> float:
    return float(places.is_border.float().mean()) if places.n_patches else 0.0


def _wilson_lower(
    counts: Int64[np.ndarray, "feature class"], n: Int64[np.ndarray, "feature 1"]
) -> Float[np.ndarray, "feature class"]:
    """Lower end of Wilson's 95 % interval of counts / n."""
    share = counts / n
    centre = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    lower: np.ndarray = (centre - half) / (1 + _Z**2 / n)
    return lower
