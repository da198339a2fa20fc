"""What an SAE is: width, sparsity, nesting. Stored in its checkpoint."""

import dataclasses

from visae.errors import ConfigError
from visae.saes.sparsity import BatchTopK, Sparsity

__all__ = ["SAEConfig", "matryoshka_prefixes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape and sparsity of an SAE."""

    d_model: int
    """Width of the activations."""
    n_features: int
    """Number of features."""
    sparsity: Sparsity = dataclasses.field(default_factory=BatchTopK)
    """Which pre-activations survive."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: sizes of nested prefixes of the features, ascending, ending with n_features."""

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
                fix="Keep at most n_features features per token",
            )
        rising = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        if self.prefixes and (not rising or self.prefixes[-1] != self.n_features):
            raise ConfigError(
                "The prefixes must ascend and end with n_features",
                where=f"prefixes {self.prefixes}, n_features {self.n_features}",
                fix="Give for example 1/16, 5/16, 9/16 and all of n_features",
            )


def matryoshka_prefixes(n_features: int) -> tuple[int, ...]:
    """Ends of the groups 1/16, 1/8, 1/4 and 9/16 of the features (2503.17547).

    Raises:
        ConfigError: when n_features is not divisible by 16.
    """
    if n_features % 16:
        raise ConfigError(
            f"n_features {n_features} is not divisible into the groups 1/16, 1/8, 1/4 and 9/16",
            fix="Give a multiple of 16",
        )
    return tuple(n_features * share // 16 for share in (1, 3, 7, 16))
