"""The ``Sparsity`` extension point: which pre-activations survive, and at what price.

A kind is a frozen dataclass. Training selects on a batch (``select``); inference may use a
threshold learned meanwhile (``threshold_of``, ``select_at``). Values never fall below zero.
Sources: METHODS §2; TopK 2406.04093, BatchTopK 2412.06410, ReLU + L1 Anthropic April 2024.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from visae.errors import ConfigError
from visae.saes.codes import SparseCodes, active_entries

__all__ = ["BatchTopK", "ReLU", "Sparsity", "TopK"]


@runtime_checkable
class Sparsity(Protocol):
    """Decides which pre-activations of a batch become feature activations."""

    @property
    def kind(self) -> str:
        """Name of the kind in checkpoints."""

    @property
    def uses_threshold(self) -> bool:
        """Whether inference keeps what lies above a learned threshold."""

    @property
    def compares_features(self) -> bool:
        """Whether, at inference, a feature's activation depends on those of other features."""

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The codes of a training batch."""

    def penalty(
        self,
        values: Float[Tensor, " entry"],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """Added to the reconstruction loss; ``norms`` are those of the entries' decoder rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLU:
    """f = ReLU(p), with the penalty λ · mean over tokens of Σ f_i ‖W_dec,i‖."""

    kind: Literal["relu"] = "relu"
    """Always ``relu``."""
    l1: float = 0.01
    """λ, in normalised units."""

    def __post_init__(self) -> None:
        if self.l1 < 0:
            raise ConfigError(f"l1 is {self.l1}", fix="Give a penalty of zero or more")

    @property
    def uses_threshold(self) -> bool:
        """Inference is the same rule as training."""
        return False

    @property
    def compares_features(self) -> bool:
        """Each feature stands alone."""
        return False

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """Every pre-activation above zero."""
        return SparseCodes.from_dense(pre)

    def penalty(
        self,
        values: Float[Tensor, " entry"],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """λ · mean over tokens of Σ f_i ‖W_dec,i‖."""
        return self.l1 * (values * norms).sum() / n_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest pre-activations of each token; of these, those above zero (2406.04093)."""

    kind: Literal["topk"] = "topk"
    """Always ``topk``."""
    k: int = 32
    """Features kept per token."""

    def __post_init__(self) -> None:
        _check_k(self.k)

    @property
    def uses_threshold(self) -> bool:
        """Inference is the same rule as training."""
        return False

    @property
    def compares_features(self) -> bool:
        """The features of a token compete."""
        return True

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The k largest of each token, negative ones dropped."""
        values, features = pre.topk(min(self.k, pre.shape[1]), dim=1, sorted=False)
        tokens = torch.arange(pre.shape[0], device=pre.device).unsqueeze(1).expand_as(features)
        alive = values > 0
        return SparseCodes.from_entries(
            tokens[alive], features[alive], values[alive], tuple(pre.shape)
        )

    def penalty(
        self,
        values: Float[Tensor, " entry"],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """None."""
        return values.new_zeros(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """The k·B largest pre-activations of a batch of B tokens, those above zero (2412.06410).

    At inference a pre-activation is kept when it exceeds θ, the running mean over training
    batches of the smallest kept value.
    """

    kind: Literal["batch-topk"] = "batch-topk"
    """Always ``batch-topk``."""
    k: int = 32
    """Features kept per token, on average."""

    def __post_init__(self) -> None:
        _check_k(self.k)

    @property
    def uses_threshold(self) -> bool:
        """Inference keeps what exceeds θ."""
        return True

    @property
    def compares_features(self) -> bool:
        """At inference each feature has only θ to exceed."""
        return False

    def select(self, pre: Float[Tensor, "token feature"]) -> SparseCodes:
        """The k·B largest of the batch, negative ones dropped."""
        n_kept = min(self.k * pre.shape[0], pre.numel())
        floor = max(0.0, _loose_floor(pre, n_kept)) if n_kept else 0.0
        tokens, features = active_entries(pre > floor)
        if tokens.shape[0] < n_kept and floor > 0.0:  # the sample misled: look at all of them
            tokens, features = active_entries(pre > 0.0)
        values = pre[tokens, features]
        if values.shape[0] > n_kept:
            kept = values.topk(n_kept, sorted=False).indices.sort().values
            tokens, features, values = tokens[kept], features[kept], values[kept]
        return SparseCodes.from_entries(tokens, features, values, tuple(pre.shape))

    def penalty(
        self,
        values: Float[Tensor, " entry"],
        norms: Float[Tensor, " entry"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """None."""
        return values.new_zeros(())


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}", fix="Keep at least one feature per token")


def _loose_floor(pre: Float[Tensor, "token feature"], n_kept: int) -> float:
    """A value that about 1.5 × ``n_kept`` pre-activations exceed, judged from some 64 tokens.

    Only a filter: what survives it is selected exactly.
    """
    sample = pre[:: max(1, pre.shape[0] // 64)].flatten()
    rank = min(sample.numel(), int(1.5 * n_kept * sample.numel() / pre.numel()) + 1)
    return float(sample.topk(rank, sorted=False).values.min())
