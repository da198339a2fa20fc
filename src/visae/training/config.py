"""What a training run is: the SAEs of the group, and the loop they share."""

import dataclasses
import math
from pathlib import PurePath
from typing import Any, Literal

from visae.activations.token_filter import TokenFilter
from visae.errors import ConfigError
from visae.models.layout import TokenPolicy
from visae.saes.config import ArchetypesConfig, SAEConfig
from visae.saes.kernels.choice import EngineName
from visae.saes.learned import AnySparsity
from visae.saes.prefixes import matryoshka_prefixes
from visae.saes.sparsity import BatchTopK
from visae.storage.records import to_plain
from visae.training.schedules import KSchedule, PenaltySchedule, RateSchedule
from visae.training.tracking import TrackerName

__all__ = ["Control", "RunConfig", "TrainConfig"]

_LONG_RUN_STEPS = 20_000
_MOST_HASTE = 16.0
_SHAPELESS = (
    *("log_steps", "checkpoint_seconds", "checkpoint_tokens"),
    *("engine", "device", "shared", "track"),
)

Control = Literal["none", "untrained", "frozen-decoder", "frozen-encoder", "random-activations"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One SAE of the group."""

    name: str
    """Name of its folder."""
    n_features: int
    """Number of features."""
    site: str | None = None
    """The site it reads; without it, the one that the group is trained on."""
    sparsity: AnySparsity = dataclasses.field(default_factory=BatchTopK)
    """Which pre-activations survive."""
    matryoshka: bool = True
    """Whether nested prefixes of the features must reconstruct too."""
    random_prefixes: int = 0
    """So many prefixes, drawn anew for each batch, instead of the groups 1/16, 1/8, 1/4, 9/16."""
    archetypes: ArchetypesConfig | None = None
    """Mix the decoder's rows from archetypes of the data instead of learning them freely."""
    orthogonality: float = 0.0
    """Weight of the penalty on features that point the same way."""
    target_site: str | None = None
    """Make a transcoder, which gives the activations at this site."""
    seed: int = 0
    """Seed of its initialisation."""
    learning_rate: float | None = None
    """Peak learning rate; without it, chosen by ``peak_learning_rate``."""
    control: Control = "none"
    """``untrained``: random directions; ``random-activations``: a dictionary of activations;
    ``frozen-decoder``, ``frozen-encoder``: random directions there, and only the rest learns."""

    def __post_init__(self) -> None:
        if self.name in ("", "..") or PurePath(self.name).name != self.name:
            raise ConfigError(
                f"{self.name!r} cannot be the name of a folder",
                where="name",
                fix="Give a name without slashes",
            )
        if self.n_features < 1:
            raise ConfigError(
                f"n_features is {self.n_features}", where=self.name, fix="Keep at least one feature"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}",
                where=self.name,
                fix="Give a number above zero, or none for the default",
            )
        if not self.orthogonality >= 0:
            raise ConfigError(
                f"orthogonality is {self.orthogonality}", where=self.name, fix="Give zero or more"
            )
        self._check_prefixes()
        self._check_archetypes()

    def _check_prefixes(self) -> None:
        if self.random_prefixes and not 2 <= self.random_prefixes <= self.n_features:
            raise ConfigError(
                f"random_prefixes is {self.random_prefixes}",
                where=self.name,
                fix="Draw at least two and at most n_features, or give 0 for the fixed groups",
            )
        if self.random_prefixes and not self.matryoshka:
            raise ConfigError(
                "random_prefixes needs matryoshka",
                where=self.name,
                fix="Set matryoshka, or random_prefixes to 0",
            )

    def _check_archetypes(self) -> None:
        if self.archetypes is None:
            return
        if self.control != "none":
            raise ConfigError(
                f"Archetypes cannot be joined with the control {self.control}",
                where=self.name,
                fix="Leave one of them out",
            )
        if self.target_site is not None:
            raise ConfigError(
                "A transcoder cannot be made of archetypes",
                where=self.name,
                fix="Leave out archetypes or target_site",
            )

    @property
    def learns(self) -> bool:
        """Whether any of its weights are trained."""
        return self.control not in ("untrained", "random-activations")

    @property
    def n_start_tokens(self) -> int:
        """Tokens to start from: one a feature, and enough to find the archetypes in."""
        n_clustered = 0 if self.archetypes is None else 32 * self.archetypes.n_centroids
        return max(self.n_features, n_clustered)

    def peak_learning_rate(self, n_steps: int) -> float:
        """The learning rate in force after warm-up, in a run of so many steps.

        2e-4 · √(16384 / n_features) (2406.04093), times √(20 000 / n_steps) in runs shorter than
        20 000 steps: a short run at the long run's rate ends far from its optimum and with dead
        features (benchmarks/learning_rate.py).
        """
        if self.learning_rate is not None:
            return self.learning_rate
        haste = max(1.0, math.sqrt(_LONG_RUN_STEPS / n_steps))
        return 2e-4 * math.sqrt(16384 / self.n_features) * min(haste, _MOST_HASTE)

    def sae_config(self, d_model: int) -> SAEConfig:
        """The SAE's shape for activations of some width."""
        return SAEConfig(
            d_model=d_model,
            n_features=self.n_features,
            sparsity=self.sparsity,
            prefixes=self._fixed_prefixes(),
            transcoder=self.target_site is not None,
        )

    def _fixed_prefixes(self) -> tuple[int, ...]:
        fixed = self.matryoshka and not self.random_prefixes
        return matryoshka_prefixes(self.n_features) if fixed else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop that all SAEs of a group share."""

    n_tokens: int = 100_000_000
    """Tokens to train on, repetitions counted."""
    batch_size: int = 4096
    """Tokens in a batch."""
    tokens: TokenPolicy = "patches"
    """Which of the recorded tokens to train on."""
    where: TokenFilter = dataclasses.field(default_factory=TokenFilter)
    """Which of these tokens."""
    data_seed: int = 0
    """Seed of the order of the tokens."""
    buffer_bytes: int | None = None
    """Memory for the loader's mixing buffer; None: what the batch size needs to mix well."""
    rate_schedule: RateSchedule = dataclasses.field(default_factory=RateSchedule)
    """How the learning rate rises and falls."""
    penalty_schedule: PenaltySchedule = dataclasses.field(default_factory=PenaltySchedule)
    """How the sparsity penalty rises."""
    k_schedule: KSchedule = dataclasses.field(default_factory=KSchedule)
    """How k falls to its own value."""
    average_decay: float | None = None
    """Keep the exponential mean of the weights, of this decay (0.999 is usual), not the last."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    auxk_alpha: float = 1 / 32
    """Weight of the dead features' loss; 0 turns it off."""
    n_dead_tokens: int | None = None
    """Tokens without firing after which a feature is dead; without it, 10 M or a tenth."""
    log_steps: int = 20
    """Steps between lines of ``metrics.jsonl``."""
    checkpoint_seconds: float = 120.0
    """Seconds between the points from which an interrupted run resumes."""
    checkpoint_tokens: int | None = None
    """Tokens between such points, whatever time has passed; without it, seconds alone count."""
    engine: EngineName = "auto"
    """What trains: ``reference`` (dense autograd), or a back end of the sparse engine."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …"""
    shared: Literal["saes", "tokens"] = "saes"
    """What several processes share out: the SAEs of the group, or the tokens of every batch."""
    track: TrackerName | None = None
    """Send the figures there too."""

    def __post_init__(self) -> None:
        if min(self.n_tokens, self.batch_size, self.log_steps) < 1:
            raise ConfigError(
                "n_tokens, batch_size and log_steps must be positive",
                where=f"n_tokens {self.n_tokens}, batch_size {self.batch_size}",
                fix="Give numbers above zero",
            )
        if self.n_tokens < self.batch_size:
            raise ConfigError(
                f"n_tokens {self.n_tokens} is less than one batch of {self.batch_size}",
                fix="Train on more tokens or with smaller batches",
            )
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}", fix="Give a number above zero")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ConfigError(
                f"average_decay is {self.average_decay}", fix="Give a number between 0 and 1"
            )
        if self.checkpoint_tokens is not None and self.checkpoint_tokens < 1:
            raise ConfigError(
                f"checkpoint_tokens is {self.checkpoint_tokens}", fix="Give a number above zero"
            )
        for name in ("auxk_alpha", "n_dead_tokens", "checkpoint_seconds"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} is {value}", fix="Give zero or more")

    @property
    def n_steps(self) -> int:
        """Optimisation steps."""
        return self.n_tokens // self.batch_size

    @property
    def dead_after(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        if self.n_dead_tokens is not None:
            return self.n_dead_tokens
        return min(10_000_000, max(1, self.n_tokens // 10))

    @property
    def shape(self) -> dict[str, Any]:
        """The settings that shape the SAEs: all but what is seen, kept and computed on."""
        settings: dict[str, Any] = to_plain(self)
        return {name: value for name, value in settings.items() if name not in _SHAPELESS}
