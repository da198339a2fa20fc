"""The back end in plain torch operations, for any device.

Slower than a back end made for the device, and the one they are read against. Sums go through
``embedding_bag``, whose order is fixed on the CPU.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from visae.saes.codes import SparseCodes
from visae.saes.kernels.adam import BETAS, EPSILON
from visae.saes.kernels.interface import (
    AdamState,
    Batch,
    Decoded,
    Encode,
    ExtraRows,
    Keep,
    RowGradients,
    Weights,
    own_bias,
)
from visae.saes.kernels.plain_codes import (
    entry_groups,
    largest_of_rows,
    plain_codes,
    row_products,
    starts_of,
)

__all__ = ["TorchKernels"]


class TorchKernels:
    """``Kernels`` for float32 weights anywhere."""

    def __init__(self, *, encode: Encode) -> None:
        self._encode = encode

    @property
    def name(self) -> str:
        """``torch``."""
        return "torch"

    @property
    def encode(self) -> Encode:
        """Precision of the products that only choose features."""
        return self._encode

    def codes(
        self, centred: Float[Tensor, "token d_model"], weights: Weights, keep: Keep
    ) -> SparseCodes:
        """The codes of a batch."""
        return plain_codes(centred, weights, keep, encode=self._encode)

    def keep_largest(
        self, pre: Float[Tensor, "token chosen"], k: int
    ) -> Float[Tensor, "token chosen"]:
        """The k largest of each row where they exceed zero, and zero elsewhere."""
        return largest_of_rows(pre, k)

    def decode(self, batch: Batch, codes: SparseCodes, weights: Weights) -> Decoded:
        """Errors by every prefix, and the gradient by the entries."""
        (n_tokens, d_model), n_prefixes = batch.wanted.shape, len(batch.bounds)
        row_of_entry = entry_groups(batch, codes)
        offsets = starts_of(row_of_entry, n_tokens * n_prefixes)
        parts = _weighted_rows(weights.w_dec, codes.values, codes.features, offsets)
        errors = parts.view(n_tokens, n_prefixes, d_model).cumsum(1)
        errors += (weights.b_dec - batch.wanted)[:, None]
        losses = errors.square().mean(dim=(0, 2))
        rows = errors.flip(1).cumsum(1).flip(1).mul_(2 / errors.numel())
        grad_values = row_products(rows.flatten(0, 1), row_of_entry, weights.w_dec, codes.features)
        return Decoded(losses, rows, grad_values)

    def row_gradients(
        self,
        batch: Batch,
        codes: SparseCodes,
        decoded: Decoded,
        *,
        weights: Weights,
        extra: ExtraRows | None = None,
    ) -> RowGradients:
        """Gradients of all parameters."""
        n_features, tokens = codes.n_features, codes.tokens
        order = torch.argsort(codes.features, stable=True)
        offsets = starts_of(codes.features, n_features)
        row_of_entry = entry_groups(batch, codes)[order]
        slopes = decoded.grad_values[order]
        w_enc = _weighted_rows(batch.centred, slopes, tokens[order], offsets)
        w_dec = _weighted_rows(
            decoded.rows.flatten(0, 1), codes.values[order], row_of_entry, offsets
        )
        b_enc = torch.zeros_like(weights.b_enc).index_add_(0, codes.features, decoded.grad_values)
        touched = offsets.diff() > 0
        if extra is not None:
            w_enc.index_add_(0, extra.features, extra.w_enc)
            w_dec.index_add_(0, extra.features, extra.w_dec)
            b_enc.index_add_(0, extra.features, extra.b_enc)
            touched[extra.features] = True
        w_dec -= (w_dec * weights.w_dec).sum(1, keepdim=True) * weights.w_dec
        b_dec = decoded.rows[:, 0].sum(0)
        if batch.subtracts_bias:
            b_dec -= own_bias(b_enc, extra) @ weights.w_enc
        gradients = Weights(w_enc, b_enc, w_dec, b_dec)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        return RowGradients(gradients, touched, norm)

    def update(
        self,
        weights: Weights,
        gradients: RowGradients,
        state: AdamState,
        *,
        rate: float,
        clip_norm: float,
    ) -> None:
        """One Adam step, in place."""
        state.n_steps += 1
        clip = (clip_norm / (gradients.norm + 1e-6)).clamp(max=1.0)
        size = rate / (1 - BETAS[0] ** state.n_steps)
        root = (1 - BETAS[1] ** state.n_steps) ** 0.5
        for weight, gradient, mean, square in zip(
            weights, gradients.weights, state.mean, state.square, strict=True
        ):
            clipped = gradient * clip
            mean.lerp_(clipped, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(clipped, clipped, value=1 - BETAS[1])
            weight.addcdiv_(mean, square.sqrt().div_(root).add_(EPSILON), value=-size)
        weights.w_dec.copy_(normalize(weights.w_dec, dim=1))


def _weighted_rows(
    rows: Tensor, weights: Tensor, index: Tensor, offsets: Tensor
) -> Float[Tensor, "bag width"]:
    """For each bag of entries, the sum of weight × row."""
    return embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
