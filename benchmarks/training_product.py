"""A child of training.py: the encode's matrix product alone, in chunks of tokens.

python training_product.py bfloat16|float32
"""

import sys

import torch
from training_worker import Case, Trial, UnsupportedError, serve

CHUNK_ELEMENTS = 2**24


def make(case: Case, x: torch.Tensor) -> Trial:
    if case.kind != "topk" or case.dead:
        raise UnsupportedError
    dtype = getattr(torch, sys.argv[1])
    tokens = x.to(dtype)
    w = torch.randn(case.n_features, case.d_model).to(case.device, dtype)
    size = min(case.batch, CHUNK_ELEMENTS // case.n_features)
    out = torch.empty(size, case.n_features, dtype=dtype, device=case.device)

    def product() -> None:
        for chunk in tokens.split(size):
            torch.mm(chunk, w.T, out=out[: chunk.shape[0]])

    return Trial(product, lambda: (torch.zeros(1), x))


if __name__ == "__main__":
    serve(make, "torch")
