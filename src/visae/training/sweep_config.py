"""A sweep: settings that vary from SAE to SAE, as TOML or in Python, and what they expand to.

Every key of a sweep may have one value or a list of values, of which all combinations are made:
those of ``[grid]``, and those of each ``[[run]]``. What a sweep leaves open, ``RunSettings`` says.
Read by ``training.sweep``, which trains the SAEs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from visae.errors import ConfigError
from visae.saes.config import ArchetypesConfig
from visae.saes.learned import AnySparsity, Gated, JumpReLU
from visae.saes.sparsity import BatchTopK, ReLU, TopK
from visae.storage.records import from_plain, read_toml, to_plain
from visae.training.choosing import ChoiceRule
from visae.training.config import Control, RunConfig

__all__ = ["KindName", "RunSettings", "SweepConfig", "read_sweep"]

KindName = Literal["batch-topk", "topk", "jumprelu", "relu", "gated"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One SAE of a sweep, by the names of the options of ``visae train``."""

    site: str | None = None
    """The site it reads; without it, the one that the sweep is trained on."""
    target_site: str | None = None
    """Make a transcoder, which gives the activations at this site."""
    kind: KindName = "batch-topk"
    """Sparsity kind."""
    k: int = 32
    """Active features per token (batch-topk: on average; jumprelu: aimed at)."""
    l1: float = 0.01
    """λ of relu and gated."""
    l0_weight: float = 1.0
    """λ of jumprelu."""
    decoder: Literal["free", "archetypal"] = "free"
    """archetypal: features are mixtures of cluster centres of the data."""
    n_centroids: int = 2048
    """Cluster centres of an archetypal decoder."""
    n_features: int | None = None
    """Number of features, instead of expansion × width."""
    expansion: int = 8
    """Features per dimension of the activations."""
    matryoshka: bool = True
    """Nested prefixes of the features must reconstruct too."""
    random_prefixes: int = 0
    """So many nested prefixes drawn for each batch, instead of fixed ones."""
    orthogonality: float = 0.0
    """Weight of a penalty on features that point the same way."""
    learning_rate: float | None = None
    """Peak learning rate; without it, chosen from the width and the length of the run."""
    control: Control = "none"
    """Make a control instead."""
    seed: int = 0
    """Seed of its initialisation."""

    def run(self, name: str, d_model: int) -> RunConfig:
        """The SAE's settings under a name, for activations of some width.

        Raises:
            ConfigError: when they do not go together.
        """
        archetypal = self.decoder == "archetypal"
        return RunConfig(
            name=name,
            n_features=self.expansion * d_model if self.n_features is None else self.n_features,
            site=self.site,
            sparsity=self._sparsity(),
            matryoshka=self.matryoshka,
            random_prefixes=self.random_prefixes,
            archetypes=ArchetypesConfig(n_centroids=self.n_centroids) if archetypal else None,
            orthogonality=self.orthogonality,
            target_site=self.target_site,
            seed=self.seed,
            learning_rate=self.learning_rate,
            control=self.control,
        )

    def _sparsity(self) -> AnySparsity:
        kinds: dict[KindName, Callable[[], AnySparsity]] = {
            "batch-topk": lambda: BatchTopK(k=self.k),
            "topk": lambda: TopK(k=self.k),
            "jumprelu": lambda: JumpReLU(target_l0=float(self.k), l0_weight=self.l0_weight),
            "relu": lambda: ReLU(l1=self.l1),
            "gated": lambda: Gated(l1=self.l1),
        }
        return kinds[self.kind]()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What varies between the SAEs of a sweep, and which of them is chosen."""

    format: int = _FORMAT
    """Version of the file's format."""
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of settings, of which every combination is an SAE."""
    run: tuple[Mapping[str, Any], ...] = ()
    """Further SAEs; with lists of values, every combination of these. ``name`` names one."""
    choice: ChoiceRule = dataclasses.field(default_factory=ChoiceRule)
    """Which SAE is chosen in the end."""

    def __post_init__(self) -> None:
        if not self.grid and not self.run:
            raise ConfigError(
                "The sweep names no SAE", where="sweep", fix="Give a [grid], or [[run]] tables"
            )

    def settings(self, base: RunSettings, *, where: object = "sweep") -> dict[str, RunSettings]:
        """The settings of every SAE by its name, which says what sets it apart.

        ``base`` is what the sweep leaves open, ``where`` the sweep's place in messages.

        Raises:
            ConfigError: when a key is unknown (naming the nearest) or mistyped, a list is empty,
                or two SAEs have one name or one set of settings.
        """
        found: list[tuple[str, RunSettings]] = []
        tables = [("grid", self.grid)] if self.grid else []
        tables += [(f"run[{number}]", table) for number, table in enumerate(self.run)]
        for title, table in tables:
            place = f"{where}, {title}"
            found += [_named(values, base, place) for values in _combinations(table, place)]
        _require_different(found, where)
        return dict(found)

    def runs(
        self, base: RunSettings, d_model: Callable[[RunSettings], int], *, where: object = "sweep"
    ) -> list[RunConfig]:
        """Every SAE to be trained; ``d_model`` gives the width that some settings read.

        Raises:
            ConfigError: as ``settings`` does, and when settings do not go together.
        """
        named = self.settings(base, where=where)
        runs = [settings.run(name, d_model(settings)) for name, settings in named.items()]
        _require_distinct(runs, where)
        return runs


def read_sweep(path: Path) -> SweepConfig:
    """Read a sweep from TOML.

    Raises:
        ConfigError: when the file is missing, not TOML, of a newer format, or has an unknown
            table (naming the nearest).
    """
    data = read_toml(Path(path))
    found = data.get("format", _FORMAT)
    if isinstance(found, int) and found > _FORMAT:
        raise ConfigError(
            f"Format {found} of sweeps is newer than format {_FORMAT}, the newest this reads",
            where=path,
            fix="Upgrade visae",
        )
    return from_plain(SweepConfig, data, where=path)


def _combinations(table: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Every combination of a table's values, the last key varying fastest."""
    lists = {
        key: value if isinstance(value, list | tuple) else [value] for key, value in table.items()
    }
    if empty := [key for key, values in lists.items() if not values]:
        raise ConfigError(f"{', '.join(empty)} has no value", where=where, fix="Give one or more")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _named(values: dict[str, Any], base: RunSettings, where: str) -> tuple[str, RunSettings]:
    own = dict(values)
    name = own.pop("name", None)
    settings: RunSettings = from_plain(RunSettings, to_plain(base) | own, where=where)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"The name {name} is not text", where=where, fix="Write it in quotes")
    return name or _name(settings, list(own)), settings


def _name(settings: RunSettings, given: Sequence[str]) -> str:
    """A folder's name that tells the values given, in the order of the settings."""
    parts = [
        _NAME_PARTS[field.name](getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name in given
    ]
    return "-".join(part for part in parts if part) or settings.kind


_NAME_PARTS: dict[str, Callable[[Any], str]] = {
    "site": lambda site: _as_name(site or ""),
    "target_site": lambda site: f"to-{_as_name(site)}" if site else "",
    "kind": str,
    "k": "k{}".format,
    "l1": "l{:g}".format,
    "l0_weight": "w{:g}".format,
    "decoder": lambda decoder: decoder,
    "n_centroids": "c{}".format,
    "n_features": lambda n: "" if n is None else f"n{n}",
    "expansion": "x{}".format,
    "matryoshka": lambda nested: "nested" if nested else "flat",
    "random_prefixes": "p{}".format,
    "orthogonality": "o{:g}".format,
    "learning_rate": lambda rate: "" if rate is None else f"lr{rate:g}",
    "control": lambda control: "" if control == "none" else control,
    "seed": "s{}".format,
}


def _as_name(site: str) -> str:
    return site.replace("/", ".").replace("\\", ".")


def _require_different(found: Sequence[tuple[str, RunSettings]], where: object) -> None:
    names = [name for name, _ in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"Two SAEs of the sweep are named {', '.join(twice)}",
            where=where,
            fix="Drop one of them, or give each [[run]] a name of its own",
        )


def _require_distinct(runs: Sequence[RunConfig], where: object) -> None:
    """Refuse SAEs that differ in a setting which their kind does not have."""
    known: dict[RunConfig, str] = {}
    for run in runs:
        nameless = dataclasses.replace(run, name="any")
        if nameless in known:
            raise ConfigError(
                f"{known[nameless]} and {run.name} would be the same SAE: "
                "what sets them apart does not matter to their kind",
                where=where,
                fix="Write kinds of different settings as [[run]] tables of their own",
            )
        known[nameless] = run.name
