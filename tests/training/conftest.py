"""Activations with a known sparse structure, and a store of them."""

import dataclasses

import pytest
import torch


@dataclasses.dataclass(frozen=True)
class Planted:
    """Tokens that are sums of a few known directions, and the store that holds them."""

    directions: torch.Tensor
    """(direction, d_model), unit rows."""
    activations: torch.Tensor
    """(image, token, d_model)."""
    store: object
    site: str = "residual@0"


@pytest.fixture(scope="session")
def make_planted(tmp_path_factory, store_of):
    """Make a store of tokens that each have ``n_active`` of the directions."""

    def make(*, n_directions=48, d_model=16, n_active=3, n_images=100, n_tokens=20, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = n_images * n_tokens, n_directions
        directions = torch.nn.functional.normalize(
            torch.randn(n_directions, d_model, generator=generator), dim=1
        )
        chosen = torch.rand(shape, generator=generator).topk(n_active, dim=1).indices
        size = torch.rand(shape, generator=generator) + 0.5
        codes = torch.zeros(shape).scatter(1, chosen, size.gather(1, chosen))
        noise = torch.randn(shape[0], d_model, generator=generator)
        tokens = 7 * (codes @ directions) + 0.1 * noise + torch.arange(d_model) / 2
        activations = tokens.view(n_images, n_tokens, d_model)
        folder = tmp_path_factory.mktemp("planted") / "store"
        store = store_of(folder, {"residual@0": activations}, shard_bytes=30_000)
        return Planted(directions, activations, store)

    return make


@pytest.fixture(scope="session")
def planted(make_planted):
    """2 000 tokens of width 16 with 3 of 48 directions each; do not change the store."""
    return make_planted()
