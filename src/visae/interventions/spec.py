"""The experiment spec: what is claimed, edited, measured and compared, fixed before confirmation.

A spec is a TOML file. Paths in it are relative to the file. Its canonical form, without paths, is
hashed for the registration. Source: RIGOR §5.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from visae.errors import ConfigError, ExperimentError
from visae.interventions.verdict import Prediction
from visae.storage.hashing import hash_json
from visae.storage.hub_path import HubPath, is_hub_path
from visae.storage.records import from_plain, read_toml, to_plain

__all__ = [
    "BestForClass",
    "ControlsConfig",
    "DosesConfig",
    "EditConfig",
    "ExperimentSpec",
    "FixedFeature",
    "LinearProbeConfig",
    "OutcomeConfig",
    "SplitConfig",
    "StatisticsConfig",
    "read_spec",
    "spec_hash",
    "spec_settings",
    "write_spec",
]

_FORMAT = 1

Operation = Literal["ablate", "scale", "set", "add"]
Unit = Literal["raw", "q50", "q90", "q99", "max"]
Scope = Literal["patches", "active-patches", "special", "all"]
Measure = Literal["probability", "logit", "margin"]
Pool = Literal["cls", "mean-patch"]


def _check_finite(name: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ConfigError(f"{name} is {value}", where=name, fix="Give a finite number")


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}", where=name, fix=f"Give {least} or more")


def _check_between(name: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{name} is {share}", where=name, fix="Give a number above 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestForClass:
    """Choose the feature that best marks a class on the discovery images."""

    kind: Literal["best-for-class"] = "best-for-class"
    """Always ``best-for-class``."""
    class_name: str
    """The class; features are ranked by average precision of their largest activation, those of
    equal precision by how few tokens they fire on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedFeature:
    """Use a feature that was chosen before."""

    kind: Literal["feature"] = "feature"
    """Always ``feature``."""
    feature: int
    """Its number."""
    chosen_from: Path | None = None
    """The feature index it was chosen from; without it the result is exploratory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What is done to the feature inside the model."""

    operation: Operation = "ablate"
    """``ablate`` to 0, ``scale`` by a factor, ``set`` to a value or ``add`` an amount."""
    value: float = 0.0
    """The factor, value or amount; unused by ``ablate``."""
    unit: Unit = "q99"
    """Unit of a value or amount: raw, or a quantile of the feature's positive activations."""
    scope: Scope = "patches"
    """Which tokens: all patches, patches where it fires, special tokens, or all."""

    def __post_init__(self) -> None:
        _check_finite("value", self.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """A linear probe on the model's final tokens, trained on the discovery images."""

    kind: Literal["linear-probe"] = "linear-probe"
    """Always ``linear-probe``."""
    pool: Pool = "cls"
    """Which final token it reads: the CLS token or the mean patch."""
    site: str = "norm"
    """Recorded site that holds the final tokens; without it they are computed from the images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutcomeConfig:
    """What is measured on each image."""

    class_name: str
    """The class whose score is measured; the images are the confirmation images of this class."""
    measure: Measure = "probability"
    """Its probability, its logit, or its margin over the best other class."""
    n_per_other_class: int = 30
    """Confirmation images of each other class, to see what else the edit changes."""

    def __post_init__(self) -> None:
        _check_least("n_per_other_class", self.n_per_other_class, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """What the edit is compared with, on the same images and tokens at the same norm."""

    n_random: int = 100
    """Random isotropic directions."""
    n_matched: int = 50
    """Other live features of similar firing rate and mean activation."""

    def __post_init__(self) -> None:
        if min(self.n_random, self.n_matched) < 0 or self.n_random + self.n_matched == 0:
            raise ConfigError(
                "An experiment needs controls",
                where=f"n_random {self.n_random}, n_matched {self.n_matched}",
                fix="Ask for 100 random directions or more",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DosesConfig:
    """The doses of the dose-response curves; a curve without doses is not made."""

    suppression: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
    """Factors on the feature where the concept is; 1 changes nothing, below 0 flips the sign."""
    insertion: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 2.0)
    """Amounts of q99 added at every token of the scope where the concept is not."""
    n_images: int = 100
    """Images used for each curve, at most."""

    def __post_init__(self) -> None:
        _check_least("n_images", self.n_images, 2)
        for name in ("suppression", "insertion"):
            doses = getattr(self, name)
            _check_finite(name, *doses)
            if doses and len(set(doses)) < 3:
                raise ConfigError(
                    f"{name} has fewer than three different doses",
                    where=f"{name} {list(doses)}",
                    fix="Give three or more, or none for no curve",
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How images are divided into discovery and confirmation."""

    confirmation_share: float = 0.5
    """Share of the images kept for confirmation."""
    salt: str = "visae"
    """Text mixed into the hash; another text gives another division."""

    def __post_init__(self) -> None:
        _check_between("confirmation_share", self.confirmation_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Resampling."""

    seed: int = 0
    """Seed of directions, resamples and permutations."""
    n_resamples: int = 10_000
    """Bootstrap resamples of an interval."""
    n_permutations: int = 10_000
    """Sign flips of the paired test."""
    level: float = 0.95
    """Level of the intervals."""

    def __post_init__(self) -> None:
        _check_least("seed", self.seed, 0)
        _check_least("n_resamples", self.n_resamples, 1000)
        _check_least("n_permutations", self.n_permutations, 1)
        _check_between("level", self.level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """One hypothesis and everything that decides it."""

    format: int = 1
    """Version of the spec's format."""
    name: str
    """Short name of the experiment."""
    hypothesis: str
    """The claim, as a sentence."""
    sae: Path
    """Folder of the SAE, or its place on the model hub: ``hf://owner/repository/folder``."""
    store: Path
    """Folder of the activation store with the images and their labels."""
    selection: BestForClass | FixedFeature
    """Which feature, or the rule that chooses it."""
    edit: EditConfig = EditConfig()
    """What is done to it."""
    task: LinearProbeConfig = LinearProbeConfig()
    """What reads the model's output."""
    outcome: OutcomeConfig
    """What is measured."""
    prediction: Prediction
    """Expected direction, smallest effect of interest, α and family size."""
    controls: ControlsConfig = ControlsConfig()
    """What the edit is compared with."""
    doses: DosesConfig = DosesConfig()
    """Doses of the dose-response curves."""
    split: SplitConfig = SplitConfig()
    """Discovery and confirmation."""
    statistics: StatisticsConfig = StatisticsConfig()
    """Resampling."""

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise _unknown_format(self.format, "format")


def read_spec(path: Path) -> ExperimentSpec:
    """Read a spec; its paths become absolute, except a place on the model hub.

    Raises:
        ConfigError: when the file is missing or not TOML.
        ExperimentError: when it is of another format, or a key is unknown, missing or mistyped
            (naming it and the nearest).
    """
    data = read_toml(Path(path))
    found = data.get("format", _FORMAT)
    if isinstance(found, int) and found != _FORMAT:  # before its unknown keys are looked at
        raise _unknown_format(found, path)
    spec = from_plain(ExperimentSpec, data, where=path, error=ExperimentError)
    return _map_paths(spec, lambda p: (Path(path).parent / p).resolve())


def write_spec(spec: ExperimentSpec, path: Path) -> None:
    """Write a spec as TOML with paths relative to the file."""
    import os

    import tomli_w

    from visae.storage.atomic import write_text

    folder = Path(path).parent.resolve()
    relative = _map_paths(spec, lambda p: Path(os.path.relpath(Path(p).resolve(), folder)))
    plain = _without_none(to_plain(relative))
    if is_hub_path(spec.sae):
        plain["sae"] = str(HubPath.parse(spec.sae, error=ExperimentError))
    write_text(Path(path), tomli_w.dumps(plain))


def spec_settings(spec: ExperimentSpec, *, sae_sha256: str, store_digest: str) -> dict[str, Any]:
    """The spec's canonical form: its settings, the SAE and the store by content, no path."""
    plain: dict[str, Any] = to_plain(spec)
    plain["sae"], plain["store"] = sae_sha256, store_digest
    plain["selection"].pop("chosen_from", None)
    return plain


def spec_hash(spec: ExperimentSpec, *, sae_sha256: str, store_digest: str) -> str:
    """Hash of the spec's canonical form."""
    return hash_json(spec_settings(spec, sae_sha256=sae_sha256, store_digest=store_digest))


def _unknown_format(found: int, where: object) -> ExperimentError:
    if found > _FORMAT:
        what = f"Format {found} of specs is newer than format {_FORMAT}, the newest this reads"
        return ExperimentError(what, where=where, fix="Upgrade visae")
    return ExperimentError(
        f"There is no format {found} of specs", where=where, fix=f"Write format = {_FORMAT}"
    )


def _map_paths(spec: ExperimentSpec, change: Callable[[Path], Path]) -> ExperimentSpec:
    selection = spec.selection
    if isinstance(selection, FixedFeature) and selection.chosen_from is not None:
        selection = dataclasses.replace(selection, chosen_from=change(selection.chosen_from))
    sae = spec.sae if is_hub_path(spec.sae) else change(spec.sae)
    return dataclasses.replace(spec, sae=sae, store=change(spec.store), selection=selection)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
