"""How the learning rate, the sparsity penalty and k change in the course of a run.

Each schedule is a factor of a step's number (from 0) and of the number of steps.
"""

import dataclasses

from visae.errors import ConfigError
from visae.saes.config import SAEConfig
from visae.saes.learned import AnySparsity
from visae.saes.sparsity import BatchTopK, TopK

__all__ = ["KSchedule", "PenaltySchedule", "RateSchedule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """The learning rate as a share of its peak: a linear rise, flat, a linear fall to zero."""

    warmup_steps: int | None = None
    """Steps of the rise; without it, 1 000 or 5 % of the run, whichever is less."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which it falls."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and not self.warmup_steps >= 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}", fix="Give zero or more")
        _check_share("decay_share", self.decay_share)

    def factor(self, step: int, n_steps: int) -> float:
        """Above zero at every step, and 1 at the peak."""
        warmup = min(1000, n_steps // 20) if self.warmup_steps is None else self.warmup_steps
        rise = min(1.0, (step + 1) / (warmup + 1))
        decay_steps = max(1, round(n_steps * self.decay_share))
        fall = min(1.0, (n_steps - step) / decay_steps)
        return rise * fall


@dataclasses.dataclass(frozen=True, kw_only=True)
class PenaltySchedule:
    """The sparsity penalty's weight λ as a share of its own: a linear rise, then flat."""

    warmup_share: float = 0.05
    """Share of the run over which it rises."""

    def __post_init__(self) -> None:
        _check_share("warmup_share", self.warmup_share)

    def factor(self, step: int, n_steps: int) -> float:
        """Above zero at every step."""
        return min(1.0, (step + 1) / max(1, int(n_steps * self.warmup_share)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KSchedule:
    """The k of TopK and BatchTopK as a multiple of its own: a linear fall to 1, then flat.

    More features that fire early on leave fewer dead. Other sparsity kinds have no k to change.
    """

    start: float = 1.0
    """The multiple that the run starts with; 1 keeps k as it is."""
    decay_share: float = 0.1
    """Share of the run, at its start, over which it falls."""

    def __post_init__(self) -> None:
        if not self.start >= 1:
            raise ConfigError(f"start is {self.start}", where="k_schedule", fix="Give one or more")
        _check_share("decay_share", self.decay_share)

    def factor(self, step: int, n_steps: int) -> float:
        """From ``start`` at the first step down to 1."""
        gone = min(1.0, step / max(1, int(n_steps * self.decay_share)))
        return self.start + (1.0 - self.start) * gone

    def at(self, config: SAEConfig, step: int, n_steps: int) -> AnySparsity:
        """The sparsity of an SAE at a step; its k is at most the number of features."""
        sparsity = config.sparsity
        if self.start == 1 or not isinstance(sparsity, TopK | BatchTopK):
            return sparsity
        k = round(sparsity.k * self.factor(step, n_steps))
        return dataclasses.replace(sparsity, k=min(k, config.n_features))


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{name} is {share}", fix="Give a share in [0, 1]")
