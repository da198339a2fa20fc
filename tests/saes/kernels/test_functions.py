import pytest
import torch

from visae.saes.kernels.compiled import NumbaKernels
from visae.saes.kernels.functions import encode_largest
from visae.saes.kernels.interface import Keep
from visae.saes.kernels.sparse import sparse_decode


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (20, 5), (20,), (20, 5)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("over", ["token", "batch"])
def test_gradients_of_encoding(over):
    def encode(x, w_enc, b_enc):
        return encode_largest(x, w_enc, b_enc, Keep(k=3, over=over)).values

    assert torch.autograd.gradcheck(encode, inputs()[:3])


def test_gradients_of_a_whole_autoencoder():
    x, w_enc, b_enc, w_dec = inputs()
    codes = encode_largest(x, w_enc, b_enc, Keep(k=3, over="token"))
    torch.autograd.backward(sparse_decode(codes.values, w_dec, codes).square().sum())
    found = [tensor.grad.clone() for tensor in (x, w_enc, b_enc, w_dec)]
    for tensor in (x, w_enc, b_enc, w_dec):
        tensor.grad = None
    dense = (x @ w_enc.T + b_enc) * (codes.dense() > 0)
    torch.autograd.backward((dense @ w_dec).square().sum())
    for one, tensor in zip(found, (x, w_enc, b_enc, w_dec), strict=True):
        torch.testing.assert_close(one, tensor.grad)


def test_a_back_end_of_choice_gives_the_same():
    x, w_enc, b_enc, _ = inputs(torch.float32)
    keep = Keep(k=3, over="batch")
    plain = encode_largest(x, w_enc, b_enc, keep)
    compiled = encode_largest(x, w_enc, b_enc, keep, kernels=NumbaKernels(encode="bfloat16"))
    assert torch.equal(plain.features, compiled.features)
    torch.testing.assert_close(plain.values, compiled.values)
    torch.autograd.backward(compiled.values.sum())
    assert w_enc.grad.abs().sum() > 0
