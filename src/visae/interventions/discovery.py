"""What may be learned before confirmation: the discovery images' features, and a choice among them.

Everything here looks at discovery images alone, and a ``Selection`` carries the ids of the images
it saw, so that a confirmation on any of them can be refused. Source: RIGOR §5.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from visae.activations.store import ActivationStore
from visae.errors import ExperimentError, nearest_names
from visae.evaluation.probes import average_precision
from visae.features.index import FeatureIndex
from visae.interventions.spec import BestForClass, FixedFeature
from visae.models.layout import TokenPolicy
from visae.progress import Progress, ProgressCallback, silent
from visae.saes.checkpoint import Provenance
from visae.saes.codes import SparseCodes
from visae.saes.sae import SAE

__all__ = [
    "FeatureProfile",
    "Profiles",
    "Selection",
    "confirmation_precision",
    "live_precision",
    "matched_features",
    "profile_features",
    "select",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureProfile:
    """How one feature behaves on the discovery images."""

    feature: int
    """Its number."""
    density: float
    """Share of tokens at which it fires."""
    mean_active: float
    """Mean of its positive activations."""
    q50: float
    """Median of its positive activations."""
    q90: float
    """90th percentile of its positive activations."""
    q99: float
    """99th percentile of its positive activations."""
    maximum: float
    """Largest activation."""

    def unit(self, name: str) -> float:
        """The size of a dose unit."""
        sizes = {"raw": 1.0, "q50": self.q50, "q90": self.q90, "q99": self.q99}
        return sizes.get(name, self.maximum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profiles:
    """How all features behave on the discovery images."""

    rows: tuple[int, ...]
    """Rows of the images in the store."""
    image_ids: tuple[str, ...]
    """Their content ids."""
    image_max: SparseCodes
    """Largest activation of each feature on each image, in the order of ``rows``."""
    density: Float64[Tensor, " feature"]
    """Share of tokens at which each feature fires."""
    mean_active: Float64[Tensor, " feature"]
    """Mean positive activation; 0 where it never fires."""
    sorted_values: Tensor
    """Positive activations, feature after feature, each ascending."""
    starts: Int64[Tensor, " feature_plus_one"]
    """Where each feature's values start in ``sorted_values``."""

    def of(self, feature: int) -> FeatureProfile:
        """One feature's profile.

        Raises:
            ExperimentError: when there is no such feature, or it never fires on these images.
        """
        n_features = self.density.shape[0]
        if not 0 <= feature < n_features:
            raise ExperimentError(
                f"There is no feature {feature}",
                where="selection.feature",
                fix=f"Give a number from 0 to {n_features - 1}",
            )
        values = self.sorted_values[self.starts[feature] : self.starts[feature + 1]].double()
        if values.numel() == 0:
            raise ExperimentError(
                f"Feature {feature} never fires on the discovery images",
                where="selection",
                fix="Choose a feature that fires, or give more images",
            )
        q50, q90, q99 = (_quantile(values, q) for q in (0.5, 0.9, 0.99))
        return FeatureProfile(
            feature=feature,
            density=float(self.density[feature]),
            mean_active=float(self.mean_active[feature]),
            q50=q50,
            q90=q90,
            q99=q99,
            maximum=float(values[-1]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen feature, how it was chosen, and the images that chose it."""

    feature: int
    """Its number."""
    rule: str
    """How it was chosen, as a phrase."""
    n_candidates: int
    """Features that were searched."""
    score: float | None
    """Average precision for the class on the discovery images, where a class was searched for."""
    runner_up: int | None
    """The second-best feature."""
    runner_up_score: float | None
    """Its score."""
    image_ids: tuple[str, ...]
    """Content ids of the images that were looked at."""
    problem: str = ""
    """Why a confirmation of this choice would be exploratory, if it would."""


def profile_features(
    sae: SAE,
    store: ActivationStore,
    site: str,
    tokens: TokenPolicy,
    rows: Sequence[int],
    *,
    progress: ProgressCallback = silent,
) -> Profiles:
    """Encode the discovery images and describe every feature.

    Memory grows with the number of active features of all their tokens: 12 bytes each.

    Raises:
        ExperimentError: when there are no rows.
    """
    if not rows:
        raise ExperimentError("There are no discovery images", fix="Give more images")
    rows = sorted(set(rows))
    wanted = torch.zeros(store.n_images, dtype=torch.bool)
    wanted[rows] = True
    per_image = store.tokens_per_image(site, tokens)
    parts: list[SparseCodes] = []
    for index, shard in enumerate(store.shards(site, tokens)):
        n_images = shard.activations.shape[0]
        kept = wanted[shard.first_image : shard.first_image + n_images]
        tokens_kept = shard.activations[kept].flatten(0, 1).to(sae.W_enc.device)
        parts.append(sae.encode_sparse(tokens_kept).cpu())
        done = index + 1
        progress(Progress(stage="discover", done=done, total=store.n_shards, unit="shards"))
    codes = SparseCodes.join(parts)
    order = torch.argsort(codes.values)
    order = order[torch.argsort(codes.features[order], stable=True)]
    counts = torch.bincount(codes.features, minlength=sae.n_features)
    sums = torch.zeros(sae.n_features, dtype=torch.float64)
    sums.index_add_(0, codes.features, codes.values.double())
    return Profiles(
        rows=tuple(rows),
        image_ids=tuple(store.images.content_ids[row] for row in rows),
        image_max=codes.max_per_image(per_image),
        density=counts.double() / max(1, codes.n_tokens),
        mean_active=sums / counts.clamp_min(1),
        sorted_values=codes.values[order],
        starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )


def select(
    rule: BestForClass | FixedFeature,
    profiles: Profiles,
    labels: Sequence[str | None],
    *,
    sae_sha256: str,
) -> Selection:
    """Choose the feature of an experiment.

    Args:
        rule: How to choose it.
        profiles: The features on the discovery images.
        labels: Those of the discovery images, in the order of ``profiles.rows``.
        sae_sha256: Checksum of the SAE's weights, for an index must be of this SAE.

    Raises:
        ExperimentError: when no discovery image has the class, the feature never fires, or it
            was chosen from an index of another SAE.
        FeatureIndexError: when that index is missing or damaged.
    """
    if isinstance(rule, FixedFeature):
        return _fixed(rule, profiles, sae_sha256)
    classes = sorted({label for label in labels if label is not None})
    if rule.class_name not in classes:
        raise ExperimentError(
            f"No discovery image has the label {rule.class_name}",
            where="selection.class_name",
            fix=f"Use one of: {nearest_names(rule.class_name, classes)}",
        )
    position = {name: index for index, name in enumerate(classes)}
    indices = torch.tensor([position.get(label or "", -1) for label in labels])
    scores = live_precision(profiles, indices, len(classes))[:, position[rule.class_name]]
    rarest_first = torch.argsort(profiles.density, stable=True)
    by_score = torch.argsort(scores[rarest_first], descending=True, stable=True)
    order = rarest_first[by_score].tolist()
    second = order[1] if int((profiles.density > 0).sum()) > 1 else None
    return Selection(
        feature=order[0],
        rule=f"highest average precision for {rule.class_name} on the discovery images",
        n_candidates=int((profiles.density > 0).sum()),
        score=float(scores[order[0]]),
        runner_up=second,
        runner_up_score=None if second is None else float(scores[second]),
        image_ids=profiles.image_ids,
    )


def live_precision(
    profiles: Profiles, classes: Int64[Tensor, " image"], n_classes: int
) -> Float64[Tensor, "feature class"]:
    """Average precision of every feature for every class; −1 for features that never fire.

    A feature that never fires has a precision too, that of chance, and would be chosen where all
    others do worse.

    Raises:
        ExperimentError: when no feature fires on the discovery images.
    """
    alive = profiles.density > 0
    if not alive.any():
        raise ExperimentError(
            "No feature fires on the discovery images",
            where="selection",
            fix="Look at the SAE with visae evaluate, and train it again",
        )
    scores = average_precision(profiles.image_max, classes, n_classes)
    return torch.where(alive.unsqueeze(1), scores, torch.full_like(scores, -1.0))


def _fixed(rule: FixedFeature, profiles: Profiles, sae_sha256: str) -> Selection:
    profiles.of(rule.feature)  # it exists and fires
    image_ids: tuple[str, ...] = profiles.image_ids
    problem = ""
    if rule.chosen_from is None:
        problem = "the spec does not say from which images the feature was chosen"
    else:
        index = FeatureIndex(Path(rule.chosen_from))
        if index.record.sae_sha256 != sae_sha256:
            raise ExperimentError(
                f"Feature {rule.feature} was chosen from the index of another SAE",
                where=rule.chosen_from,
                fix="Give an index of the experiment's SAE in selection.chosen_from",
            )
        image_ids = index.images.content_ids
    return Selection(
        feature=rule.feature,
        rule=f"feature {rule.feature}, fixed by the spec",
        n_candidates=1,
        score=None,
        runner_up=None,
        runner_up_score=None,
        image_ids=image_ids,
        problem=problem,
    )


def confirmation_precision(
    sae: SAE,
    store: ActivationStore,
    provenance: Provenance,
    feature: int,
    rows: Sequence[int],
    class_name: str,
) -> tuple[float | None, float | None]:
    """A feature's average precision for a class on other images, and the class's share of them.

    Images without a label are left out. None for both where no image, or every image, has the
    class.
    """
    from sklearn.metrics import average_precision_score

    wanted = {row for row in rows if store.images.labels[row] is not None}
    largest: list[float] = []
    targets: list[bool] = []
    for shard in store.shards(provenance.site, provenance.tokens):
        for offset, tokens in enumerate(shard.activations):
            row = shard.first_image + offset
            if row in wanted:
                active = sae.feature_activations(tokens.to(sae.W_enc.device), [feature])
                largest.append(float(active.max()))
                targets.append(store.images.labels[row] == class_name)
    prevalence = sum(targets) / max(1, len(targets))
    if prevalence in (0.0, 1.0):
        return None, None
    return float(average_precision_score(targets, largest)), prevalence


def matched_features(profiles: Profiles, feature: int, n: int) -> list[int]:
    """Other live features nearest in firing rate and mean activation (in logarithms).

    Raises:
        ExperimentError: when fewer than ``n`` other features are alive.
    """
    alive = profiles.density > 0
    alive[feature] = False
    candidates = torch.nonzero(alive).flatten()
    if candidates.numel() < n:
        raise ExperimentError(
            f"{candidates.numel()} other features fire on the discovery images, {n} are asked for",
            where="controls.n_matched",
            fix=f"Ask for {candidates.numel()} or fewer",
        )
    traits = torch.stack([profiles.density.log(), profiles.mean_active.log()], dim=1)
    spread = traits[candidates].std(dim=0, correction=0).clamp_min(1e-6)
    distance = ((traits[candidates] - traits[feature]) / spread).norm(dim=1)
    return [int(candidates[i]) for i in torch.argsort(distance, stable=True)[:n]]


def _quantile(ascending: Float64[Tensor, " value"], q: float) -> float:
    """The q-quantile of sorted values, linear between them, for any number of values."""
    place = q * (ascending.shape[0] - 1)
    below = int(place)
    above = min(below + 1, ascending.shape[0] - 1)
    return float(ascending[below].lerp(ascending[above], place - below))
