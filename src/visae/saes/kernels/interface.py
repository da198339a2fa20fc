"""What a back end of the sparse engine computes, and the figures that pass between its parts.

One optimisation step of a TopK or BatchTopK SAE is, for B normalised tokens y to rebuild, what the
encoder sees of them c (y − b_dec, but y of another site in a transcoder) and M nested prefixes of
the features that end at n_1 < n_2 < … < n_M:

    codes            f = the k largest pre-activations W_enc c + b_enc, if above zero
    decode           r_m = Σ_{i < n_m} f_i W_dec,i + b_dec − y      L = Σ_m ‖r_m‖² / (M·B·d)
    row gradients    ∂L/∂W_dec,i = Σ_t f_ti G_t,m(i)      ∂L/∂W_enc,i = Σ_t g_ti c_t
    update           Adam on every parameter, then W_dec rows made unit

with G_t,m = 2/(M·B·d) Σ_{m' ≥ m} r_t,m', m(i) the first prefix with i, g_ti = G_t,m(i)·W_dec,i.
A back end is an object with these four methods (``Kernels``); they agree to float32 rounding.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from visae.saes.codes import SparseCodes

__all__ = [
    "AdamState",
    "Batch",
    "Decoded",
    "Encode",
    "ExtraRows",
    "Keep",
    "Kernels",
    "RowGradients",
    "Weights",
    "own_bias",
]

Encode = Literal["bfloat16", "float32"]
"""Precision of the products that only choose features; values are float32 in either."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which pre-activations of a batch survive; of these, those above zero."""

    k: int
    """Features kept per token, or per token on average."""
    over: Literal["token", "batch"]
    """The k largest of each token (TopK), or the k·B largest of the batch (BatchTopK)."""


class Weights(NamedTuple):
    """The parameters of an SAE, float32, without gradient; an update changes them in place."""

    w_enc: Float[Tensor, "feature d_model"]
    """Encoder, one row a feature."""
    b_enc: Float[Tensor, " feature"]
    """Encoder bias."""
    w_dec: Float[Tensor, "feature d_model"]
    """Decoder, one unit row a feature."""
    b_dec: Float[Tensor, " d_model"]
    """Decoder bias."""


class Batch(NamedTuple):
    """The tokens of one step, normalised, and how they are to be rebuilt."""

    centred: Float[Tensor, "token d_model"]
    """What the encoder sees, c."""
    wanted: Float[Tensor, "token d_model"]
    """What the decoder should give, y."""
    bounds: tuple[int, ...]
    """Where the nested prefixes of the features end, ascending, the last at their number."""
    subtracts_bias: bool = True
    """Whether c is y − b_dec, so that b_dec has a gradient through the encoder too."""


class Decoded(NamedTuple):
    """Reconstruction errors of a batch, and the gradient they send back."""

    losses: Float[Tensor, " prefix"]
    """Mean over tokens of ‖r_m‖² / d_model, for each prefix."""
    rows: Float[Tensor, "token prefix d_model"]
    """G: the loss's gradient by what the features new in each prefix add to a token."""
    grad_values: Float[Tensor, " entry"]
    """The loss's gradient by each entry of the codes."""


class ExtraRows(NamedTuple):
    """Gradients of some features' rows that come from elsewhere (AuxK), to be added."""

    features: Int64[Tensor, " chosen"]
    """Which features, ascending."""
    w_enc: Float[Tensor, "chosen d_model"]
    """By their encoder rows."""
    b_enc: Float[Tensor, " chosen"]
    """By their encoder biases."""
    w_dec: Float[Tensor, "chosen d_model"]
    """By their decoder rows."""


class RowGradients(NamedTuple):
    """The loss's gradient by every parameter; decoder rows without the part along the row."""

    weights: Weights
    """The gradients; rows that are not ``touched`` hold nothing and count as zero."""
    touched: Bool[Tensor, " feature"]
    """Features with an entry in the codes or among the extra rows."""
    norm: Float[Tensor, ""]
    """Norm of all gradients together."""


@dataclasses.dataclass
class AdamState:
    """Adam's running means, one tensor a parameter, changed in place by every update."""

    mean: Weights
    """Exponential mean of gradients."""
    square: Weights
    """Exponential mean of squared gradients."""
    n_steps: int = 0
    """Updates made so far."""


@runtime_checkable
class Kernels(Protocol):
    """The parts of a step; every method keeps its inputs, except the update."""

    @property
    def name(self) -> str:
        """``torch``, ``numba`` or ``triton``."""

    @property
    def encode(self) -> Encode:
        """Precision of the products that only choose features."""

    def codes(
        self, centred: Float[Tensor, "token d_model"], weights: Weights, keep: Keep
    ) -> SparseCodes:
        """The codes of what the encoder sees, each token's entries by ascending feature.

        Values are float32 products; with a bfloat16 encode, candidates are kept with a margin
        that no rounding exceeds, so that the set is that of float32.
        """

    def keep_largest(
        self, pre: Float[Tensor, "token chosen"], k: int
    ) -> Float[Tensor, "token chosen"]:
        """The k largest of each row where they exceed zero, and zero elsewhere; any precision."""

    def decode(self, batch: Batch, codes: SparseCodes, weights: Weights) -> Decoded:
        """Errors by every prefix, and the gradient by the entries."""

    def row_gradients(
        self,
        batch: Batch,
        codes: SparseCodes,
        decoded: Decoded,
        *,
        weights: Weights,
        extra: ExtraRows | None = None,
    ) -> RowGradients:
        """Gradients of all parameters; what is returned is overwritten by the next call."""

    def update(
        self,
        weights: Weights,
        gradients: RowGradients,
        state: AdamState,
        *,
        rate: float,
        clip_norm: float,
    ) -> None:
        """One Adam step (β 0.9, 0.999, ε 6.25e-10), the global norm clipped; unit W_dec rows."""


def own_bias(
    grad_bias: Float[Tensor, " feature"], extra: ExtraRows | None
) -> Float[Tensor, " feature"]:
    """The encoder bias' gradient without the extra rows' part, which never reaches b_dec."""
    if extra is None:
        return grad_bias
    return grad_bias.index_add(0, extra.features, extra.b_enc, alpha=-1)
