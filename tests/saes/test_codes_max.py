"""The largest activation of each feature on each image, against the dense matrix."""

import pytest
import torch

import visae.saes.codes
from visae.saes.codes import SparseCodes


@pytest.mark.parametrize("n_images", [0, 1, 7])
@pytest.mark.parametrize("elements", [1, 12, 2**24])
def test_maxima_are_those_of_the_dense_activations(n_images, elements, monkeypatch):
    monkeypatch.setattr(visae.saes.codes, "_DENSE_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(n_images, 5, 6, generator=generator).sub(0.8).clamp_min(0.0)
    dense[3:4] = 0.0  # an image on which nothing fires
    found = SparseCodes.from_dense(dense.flatten(0, 1)).max_per_image(5)
    expected = dense.amax(1)
    assert found.n_tokens == n_images
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found.values, expected[expected > 0])
