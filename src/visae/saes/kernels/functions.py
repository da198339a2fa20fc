"""The engine's encode and decode for models of one's own, with gradients by autograd.

    codes = encode_largest(x, w_enc, b_enc, Keep(k=32, over="token"))
    rebuilt = sparse_decode(codes.values, w_dec, codes)

Gradients reach x and the weights, at the cost of the active features alone; which features are
active has no gradient. ``sparse_decode`` is in ``saes/kernels/sparse.py``.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from visae.saes.codes import SparseCodes
from visae.saes.kernels.interface import Keep, Kernels, Weights
from visae.saes.kernels.plain import TorchKernels
from visae.saes.kernels.sparse import FeatureLists, sparse_decode

__all__ = ["encode_largest"]


def encode_largest(
    x: Float[Tensor, "token d_model"],
    w_enc: Float[Tensor, "feature d_model"],
    b_enc: Float[Tensor, " feature"],
    keep: Keep,
    *,
    kernels: Kernels | None = None,
) -> SparseCodes:
    """The largest pre-activations W_enc x + b_enc, if above zero: values with gradients.

    By plain torch operations without ``kernels``, in the precision of the weights.
    """
    back_end = kernels or TorchKernels(encode="float32")
    with torch.no_grad():
        weights = Weights(w_enc.detach(), b_enc.detach(), w_enc.detach(), b_enc.new_zeros(0))
        codes = back_end.codes(x.detach(), weights, keep)
    return codes._replace(values=_EntryValues.apply(x, w_enc, b_enc, codes))


class _EntryValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, codes: SparseCodes) -> Tensor:
        ctx.save_for_backward(x, w_enc)
        ctx.codes = codes
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc = ctx.saved_tensors
        codes: SparseCodes = ctx.codes
        lists = FeatureLists(codes)
        grad_bias = grad.new_zeros(w_enc.shape[0]).index_add_(0, codes.features, grad)
        grad_rows = lists.sum_rows(x, lists.tokens, grad.contiguous())
        return sparse_decode(grad.contiguous(), w_enc, codes), grad_rows, grad_bias, None
