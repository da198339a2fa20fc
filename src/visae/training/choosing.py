"""Which SAE of a sweep to go on with: a stated rule, and the front of NMSE against L0.

SAEs are compared with those that read and give the same sites: errors at two sites have no common
measure. Controls are never chosen.
"""

import dataclasses
from collections.abc import Sequence

from visae.errors import ConfigError

__all__ = ["Candidate", "ChoiceRule", "choose", "front"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceRule:
    """The lowest NMSE among the SAEs that stay within some bounds."""

    largest_l0: float | None = None
    """Most active features per token; without it, any number."""
    largest_dead_share: float = 0.05
    """Largest share of dead features."""
    largest_dense_share: float | None = None
    """Largest share of features that fire on more than a tenth of the tokens."""

    def __post_init__(self) -> None:
        if self.largest_l0 is not None and not self.largest_l0 > 0:
            raise ConfigError(f"largest_l0 is {self.largest_l0}", fix="Give a number above zero")
        for name in ("largest_dead_share", "largest_dense_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"{name} is {share}", fix="Give a share in [0, 1]")

    @property
    def text(self) -> str:
        """The rule as a phrase."""
        bounds = [] if self.largest_l0 is None else [f"L0 at most {self.largest_l0:g}"]
        bounds.append(f"at most {self.largest_dead_share:.3g} of the features dead")
        if self.largest_dense_share is not None:
            bounds.append(f"at most {self.largest_dense_share:.3g} of them dense")
        joined = " and ".join(filter(None, (", ".join(bounds[:-1]), bounds[-1])))
        return f"the lowest NMSE of the SAEs with {joined}"

    def allows(self, candidate: "Candidate") -> bool:
        """Whether an SAE is within the bounds."""
        return (
            (self.largest_l0 is None or candidate.l0 <= self.largest_l0)
            and candidate.dead_share <= self.largest_dead_share
            and (
                self.largest_dense_share is None
                or candidate.dense_share <= self.largest_dense_share
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """An SAE that may be chosen, by its figures."""

    name: str
    """Its name."""
    nmse: float
    """Normalised mean squared error."""
    l0: float
    """Active features per token."""
    dead_share: float
    """Share of dead features."""
    dense_share: float
    """Share of features that fire on more than a tenth of the tokens."""


def choose(candidates: Sequence[Candidate], rule: ChoiceRule) -> str | None:
    """The name of the SAE that the rule chooses, the first among equals; None if none fits."""
    allowed = [candidate for candidate in candidates if rule.allows(candidate)]
    return min(allowed, key=lambda candidate: candidate.nmse).name if allowed else None


def front(candidates: Sequence[Candidate]) -> set[str]:
    """The names of the SAEs that no other one beats: none has less NMSE at no larger L0."""
    return {
        candidate.name
        for candidate in candidates
        if not any(_beats(other, candidate) for other in candidates)
    }


def _beats(one: Candidate, other: Candidate) -> bool:
    no_worse = one.nmse <= other.nmse and one.l0 <= other.l0
    return no_worse and (one.nmse < other.nmse or one.l0 < other.l0)
