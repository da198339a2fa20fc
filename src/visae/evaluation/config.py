"""What an evaluation measures, on how much, and against which nulls."""

import dataclasses
from typing import Literal

from visae.errors import ConfigError

__all__ = ["Baseline", "EvaluateConfig"]

Baseline = Literal["untrained", "random-activations"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of one evaluation."""

    baselines: tuple[Baseline, ...] = ("untrained", "random-activations")
    """Dictionaries of the same size and L0 that every metric is compared with."""
    confirmation_share: float = 0.5
    """Share of the images on which chosen features are scored; the rest choose them."""
    salt: str = "visae"
    """Changes which images fall on which side."""
    level: float = 0.95
    """Coverage of the intervals."""
    n_resamples: int = 2_000
    """Bootstrap resamples of the images."""
    n_permutations: int = 100
    """Permutations of the labels."""
    n_class_images: int = 10_000
    """Most images used for class metrics, spread evenly over the store."""
    coverage_precision: float = 0.3
    """Average precision from which a class counts as covered."""
    n_top: int = 16
    """Images in the precision of the top."""
    n_sampled_tokens: int = 8_192
    """Most tokens on which a baseline gets its threshold and a feature shows that it lives."""
    n_stability_features: int = 2_048
    """Most live features matched with those of another SAE."""
    n_rotations: int = 5
    """Random rotations that stability is compared with."""
    n_spliced_images: int = 256
    """Most images run through the model with the reconstruction spliced in."""
    batch_size: int = 32
    """Images in one pass of the model."""
    seed: int = 0
    """Seed of the baselines, permutations, rotations and resamples."""

    def __post_init__(self) -> None:
        least = {
            "n_permutations": 20,
            "n_resamples": 1000,
            "n_class_images": 2,
            "n_top": 1,
            "n_sampled_tokens": 1,
            "n_stability_features": 2,
            "n_rotations": 1,
            "n_spliced_images": 2,
            "batch_size": 1,
        }
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=name, fix=f"Give at least {number}"
                )
        for name in ("confirmation_share", "level", "coverage_precision"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    where=name,
                    fix="Give a number above 0 and below 1",
                )
        if len(set(self.baselines)) != len(self.baselines):
            raise ConfigError(
                "A baseline is named twice",
                where=f"baselines {', '.join(self.baselines)}",
                fix="Name each once",
            )
