"""Sparsity kinds that learn a number or two for every feature: JumpReLU and Gated.

Such a rule works on the entries of a batch that can matter (``candidates``): it turns their
pre-activations and the learned numbers of their features into feature activations (``activate``),
with gradients for both. The numbers live in the SAE (``SAE.learned``) and in its checkpoint, in
float32. Training and inference follow one rule. Sources: METHODS §2.

Main names: ``JumpReLU`` (2407.14435), ``Gated`` (2404.16014), ``LearnedSparsity``, what both are.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from visae.errors import ConfigError
from visae.saes.codes import SparseCodes, active_entries
from visae.saes.sparsity import Sparsity

__all__ = [
    "AnySparsity",
    "Gated",
    "JumpReLU",
    "LearnedSparsity",
    "LearnedVector",
    "learned_codes",
]


class LearnedVector(NamedTuple):
    """A number that every feature learns."""

    start: float
    """Where it starts."""
    least: float = -math.inf
    """It is held at or above this."""


@runtime_checkable
class LearnedSparsity(Protocol):
    """Decides by pre-activations and learned numbers which features are active, and how much.

    Mappings of vectors hold the kind's own, by name, and the encoder's bias as ``b_enc``: one
    number a feature, or the number of each entry's feature.
    """

    @property
    def kind(self) -> str:
        """Name of the kind in checkpoints."""

    @property
    def uses_threshold(self) -> bool:
        """Whether inference keeps what lies above one threshold for all features."""

    @property
    def compares_features(self) -> bool:
        """Whether a feature's activation depends on those of other features."""

    @property
    def vectors(self) -> Mapping[str, LearnedVector]:
        """The learned numbers of a feature, by name."""

    def calibrate(self, pre: Float[Tensor, "token feature"]) -> Mapping[str, float]:
        """Better starts for some of the vectors, from the first batch's pre-activations."""

    def candidates(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> SparseCodes:
        """The entries whose activation or gradient can differ from zero.

        Their values are pre-activations, not all of which need be positive.
        """

    def activate(
        self, pre: Float[Tensor, " entry"], vectors: Mapping[str, Float[Tensor, " entry"]]
    ) -> Float[Tensor, " entry"]:
        """Feature activations of entries, zero or more, with gradients."""

    def margin(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> Float[Tensor, "token feature"]:
        """How far pre-activations are above what switches their feature on; below it, negative."""

    def gate_values(self, pre: Float[Tensor, " entry"]) -> Float[Tensor, " entry"] | None:
        """Values that must reconstruct too, through a decoder that does not learn from it."""

    def penalty(
        self,
        pre: Float[Tensor, " entry"],
        vectors: Mapping[str, Float[Tensor, " entry"]],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """Added to the reconstruction loss; ``norms`` are those of the entries' decoder rows."""


AnySparsity = Sparsity | LearnedSparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """f = p where p > θ, else 0, with one learned θ ≥ 0 a feature (2407.14435).

    The penalty is λ · (L0 / L0* − 1)² with a target L0*, else λ · L0; L0 is the mean over tokens
    of the number of active features. Gradients reach θ through a rectangle of width ε around it:
    ∂f/∂θ = −(θ/ε) · 1[|p − θ| < ε/2] and ∂1[p > θ]/∂θ = −(1/ε) · 1[|p − θ| < ε/2].
    """

    kind: Literal["jumprelu"] = "jumprelu"
    """Always ``jumprelu``."""
    target_l0: float | None = 32.0
    """L0*, the active features per token to aim at; without it, the penalty is λ · L0."""
    l0_weight: float = 1.0
    """λ, in normalised units; without a target, 1e-4 to 1e-2 is usual."""
    bandwidth: float = 0.3
    """ε, in normalised units. A narrow window holds few pre-activations, so θ follows slowly."""
    threshold_start: float = 0.001
    """θ before training, in normalised units; with a target, chosen by the first batch instead."""

    def __post_init__(self) -> None:
        if self.target_l0 is not None and not self.target_l0 > 0:
            raise ConfigError(f"target_l0 is {self.target_l0}", fix="Give a number above zero")
        if not self.l0_weight >= 0:
            raise ConfigError(f"l0_weight is {self.l0_weight}", fix="Give zero or more")
        if not self.bandwidth > 0:
            raise ConfigError(f"bandwidth is {self.bandwidth}", fix="Give a width above zero")
        if not self.threshold_start >= 0:
            raise ConfigError(f"threshold_start is {self.threshold_start}", fix="Give zero or more")

    @property
    def uses_threshold(self) -> bool:
        """Every feature has its own."""
        return False

    @property
    def compares_features(self) -> bool:
        """Each feature stands alone."""
        return False

    @property
    def vectors(self) -> Mapping[str, LearnedVector]:
        """θ."""
        return {"threshold": LearnedVector(self.threshold_start, least=0.0)}

    def calibrate(self, pre: Float[Tensor, "token feature"]) -> Mapping[str, float]:
        """With a target, the θ that gives it on this batch."""
        if self.target_l0 is None or pre.numel() == 0:
            return {}
        n_active = min(pre.numel(), max(1, round(self.target_l0 * pre.shape[0])))
        floor = pre.flatten().kthvalue(pre.numel() - n_active + 1).values
        return {"threshold": max(0.0, float(floor))}

    def candidates(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> SparseCodes:
        """What lies above θ − ε/2."""
        tokens, features = active_entries(pre > vectors["threshold"] - self.bandwidth / 2)
        return SparseCodes.from_entries(
            tokens, features, pre[tokens, features], (pre.shape[0], pre.shape[1])
        )

    def activate(
        self, pre: Float[Tensor, " entry"], vectors: Mapping[str, Float[Tensor, " entry"]]
    ) -> Float[Tensor, " entry"]:
        """The pre-activation where it exceeds θ."""
        result: Tensor = _Jump.apply(pre, vectors["threshold"], self.bandwidth)
        return result

    def margin(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> Float[Tensor, "token feature"]:
        """The pre-activation less θ."""
        return pre - vectors["threshold"].clamp_min(0)

    def gate_values(self, pre: Float[Tensor, " entry"]) -> None:
        """None."""

    def penalty(
        self,
        pre: Float[Tensor, " entry"],
        vectors: Mapping[str, Float[Tensor, " entry"]],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """λ · (L0 / L0* − 1)², or λ · L0."""
        active: Tensor = _Step.apply(pre, vectors["threshold"], self.bandwidth)
        l0 = active.sum() / n_tokens
        if self.target_l0 is None:
            return self.l0_weight * l0
        return self.l0_weight * (l0 / self.target_l0 - 1).square()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated:
    """f = ReLU(exp(r) · (p − b_enc) + b) where the gate's pre-activation p > 0 (2404.16014).

    Gate and magnitude share W_enc; r and b are learned, a number a feature. The gate learns from
    λ · mean over tokens of Σ ReLU(p_i) ‖W_dec,i‖ and from the error of the reconstruction by
    ReLU(p) with a frozen decoder; the magnitude learns from the reconstruction.
    """

    kind: Literal["gated"] = "gated"
    """Always ``gated``."""
    l1: float = 0.01
    """λ, in normalised units."""

    def __post_init__(self) -> None:
        if not self.l1 >= 0:
            raise ConfigError(f"l1 is {self.l1}", fix="Give a penalty of zero or more")

    @property
    def uses_threshold(self) -> bool:
        """The gate opens at zero."""
        return False

    @property
    def compares_features(self) -> bool:
        """Each feature stands alone."""
        return False

    @property
    def vectors(self) -> Mapping[str, LearnedVector]:
        """r, the logarithm of the magnitude's gain over the gate, and b, its bias."""
        return {"log_gain": LearnedVector(0.0), "magnitude_bias": LearnedVector(0.0)}

    def calibrate(self, pre: Float[Tensor, "token feature"]) -> Mapping[str, float]:
        """Magnitude and gate start as one."""
        return {}

    def candidates(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> SparseCodes:
        """Where the gate is open."""
        return SparseCodes.from_dense(pre)

    def activate(
        self, pre: Float[Tensor, " entry"], vectors: Mapping[str, Float[Tensor, " entry"]]
    ) -> Float[Tensor, " entry"]:
        """The magnitudes; b_enc is the gate's alone, so its gradient cancels here."""
        shared = pre - vectors["b_enc"]
        return (vectors["log_gain"].exp() * shared + vectors["magnitude_bias"]).relu()

    def margin(
        self, pre: Float[Tensor, "token feature"], vectors: Mapping[str, Float[Tensor, " feature"]]
    ) -> Float[Tensor, "token feature"]:
        """The gate's pre-activation."""
        return pre

    def gate_values(self, pre: Float[Tensor, " entry"]) -> Float[Tensor, " entry"]:
        """ReLU(p): the gate is open at every entry."""
        return pre

    def penalty(
        self,
        pre: Float[Tensor, " entry"],
        vectors: Mapping[str, Float[Tensor, " entry"]],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """λ · mean over tokens of Σ ReLU(p_i) ‖W_dec,i‖."""
        return self.l1 * (pre * norms).sum() / n_tokens


def learned_codes(entries: SparseCodes, values: Float[Tensor, " entry"]) -> SparseCodes:
    """The codes of candidates that turned out active."""
    active = values > 0
    return SparseCodes.from_entries(
        entries.tokens[active],
        entries.features[active],
        values[active],
        (entries.n_tokens, entries.n_features),
    )


class _Jump(torch.autograd.Function):
    """p · 1[p > θ]; a p at or below zero is never active."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold.clamp_min(0), pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.bandwidth / 2
        to_pre = torch.where(pre > threshold.clamp_min(0), grad, 0)
        return to_pre, torch.where(inside, -grad * threshold / ctx.bandwidth, 0), None


class _Step(torch.autograd.Function):
    """1[p > θ], whose gradient reaches θ alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold.clamp_min(0)).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, torch.where(inside, -grad / ctx.bandwidth, 0), None
