"""What an SAE is: width, sparsity, nesting. Stored in its checkpoint."""

import dataclasses

from visae.errors import ConfigError
from visae.saes.learned import AnySparsity
from visae.saes.sparsity import BatchTopK

__all__ = ["ArchetypesConfig", "SAEConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape and sparsity of an SAE."""

    d_model: int
    """Width of the activations."""
    n_features: int
    """Number of features."""
    sparsity: AnySparsity = dataclasses.field(default_factory=BatchTopK)
    """Which pre-activations survive."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: sizes of nested prefixes of the features, ascending, ending with n_features."""
    transcoder: bool = False
    """Whether it gives the activation at another site, which has a mean and scale of its own."""

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.n_features < 1:
            raise ConfigError(
                "d_model and n_features must be positive",
                where=f"d_model {self.d_model}, n_features {self.n_features}",
                fix="Give numbers above zero",
            )
        k = getattr(self.sparsity, "k", 0)
        if k > self.n_features:
            raise ConfigError(
                f"k is {k} and n_features is {self.n_features}",
                where=f"sparsity {self.sparsity.kind}",
                fix="Keep at most n_features features per token",
            )
        rising = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        if self.prefixes and (not rising or self.prefixes[-1] != self.n_features):
            raise ConfigError(
                "The prefixes must ascend and end with n_features",
                where=f"prefixes {self.prefixes}, n_features {self.n_features}",
                fix="Give for example 1/16, 5/16, 9/16 and all of n_features",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchetypesConfig:
    """A decoder made of archetypes of the data (``saes.archetypal``, 2502.12892)."""

    n_centroids: int = 2048
    """Centroids that the rows are mixed from."""
    delta: float = 1.0
    """δ, how far a mixture may leave them, in normalised units (a token's norm is √d_model)."""

    def __post_init__(self) -> None:
        if self.n_centroids < 2:
            raise ConfigError(f"n_centroids is {self.n_centroids}", fix="Give at least two")
        if not self.delta >= 0:
            raise ConfigError(f"delta is {self.delta}", fix="Give zero or more")
