"""Nested prefixes of the features for the Matryoshka loss (2503.17547): fixed, or drawn anew.

Every prefix must reconstruct by itself, so the first features learn what is most common.
"""

import torch

from visae.errors import ConfigError

__all__ = ["matryoshka_prefixes", "random_prefixes"]


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


def random_prefixes(
    n_features: int, n_prefixes: int, generator: torch.Generator
) -> tuple[int, ...]:
    """Prefixes for one batch, ascending: all features, and others drawn without repetition.

    Lengths follow a Pareto law of power 1/2, P(length ≤ l) = 1 − l^(−1/2), so that short ones are
    frequent and each order of magnitude is met.
    """
    lengths = torch.arange(1, n_features, dtype=torch.float64)
    chances = lengths.rsqrt() - (lengths + 1).rsqrt()
    n_drawn = min(n_prefixes, n_features) - 1
    if n_drawn < 1:
        return (n_features,)
    drawn = torch.multinomial(chances, n_drawn, replacement=False, generator=generator)
    return (*sorted(int(index) + 1 for index in drawn), n_features)
