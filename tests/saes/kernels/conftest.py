"""One small SAE and batch, and the back ends for the CPU."""

import pytest
import torch

from visae.saes.kernels.compiled import NumbaKernels
from visae.saes.kernels.interface import Batch, Weights
from visae.saes.kernels.plain import TorchKernels

BACK_ENDS = {"numba": NumbaKernels, "torch": TorchKernels}


@pytest.fixture(scope="session", params=sorted(BACK_ENDS))
def back_end(request):
    """The class of a back end."""
    return BACK_ENDS[request.param]


@pytest.fixture(scope="session", params=["bfloat16", "float32"])
def kernels(request, back_end):
    """A back end in one precision."""
    return back_end(encode=request.param)


@pytest.fixture(scope="session")
def weights_of():
    """Make weights with rows of very different norms, and one feature that fires for nearly all."""

    def make(n_features, d_model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        w_enc = torch.randn(n_features, d_model, generator=generator)
        w_enc *= torch.rand(n_features, 1, generator=generator) * 2
        b_enc = torch.randn(n_features, generator=generator) * 0.3
        b_enc[0] = 20
        w_dec = torch.nn.functional.normalize(torch.randn(w_enc.shape, generator=generator), dim=1)
        return Weights(w_enc, b_enc, w_dec, torch.randn(d_model, generator=generator) * 0.1)

    return make


@pytest.fixture(scope="session")
def batch_of():
    """Make tokens with an outlying dimension; the first is exactly zero once centred."""

    def make(weights, n_tokens, cuts=(), seed=1):
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.randn(n_tokens, weights.b_dec.shape[0], generator=generator)
        wanted[:, 0] *= 8
        wanted[0] = weights.b_dec
        n_features = weights.b_enc.shape[0]
        bounds = (*sorted(cut for cut in cuts if cut < n_features), n_features)
        return Batch(wanted - weights.b_dec, wanted, bounds)

    return make
