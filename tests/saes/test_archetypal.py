import pytest
import torch

from visae.errors import ConfigError
from visae.saes.archetypal import Archetypes
from visae.saes.config import ArchetypesConfig

D_MODEL, N_FEATURES = 6, 30


def tokens(n_tokens=400, seed=0):
    """Tokens around eight far-apart points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(8, D_MODEL, generator=generator) * 5
    noise = torch.randn(n_tokens, D_MODEL, generator=generator)
    return points[torch.arange(n_tokens) % 8] + 0.1 * noise, points


def started(seed=0, **settings):
    x, points = tokens()
    config = ArchetypesConfig(**{"n_centroids": 8} | settings)
    archetypes = Archetypes(config, n_features=N_FEATURES, d_model=D_MODEL)
    archetypes.start(x, seed=seed)
    return archetypes, points


def test_centroids_are_found_in_the_data():
    archetypes, points = started(n_centroids=16)
    distance = torch.cdist(points, archetypes.centroids).min(dim=1).values
    assert (distance < 1.0).all()


def test_rows_are_unit_mixtures_and_no_two_alike():
    archetypes, _ = started()
    rows = archetypes.rows().detach()
    mixture = archetypes.mixture.detach()
    torch.testing.assert_close(mixture.sum(1), torch.ones(N_FEATURES))
    assert (mixture >= 0).all()
    expected = torch.nn.functional.normalize(mixture @ archetypes.centroids, dim=1)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(N_FEATURES))


def test_one_seed_gives_one_start_and_another_other_centroids():
    """A fair test of stability needs other centroids for every seed."""
    first, same, other = (started(seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.rows(), same.rows())
    assert not torch.equal(first.centroids, other.centroids)


def test_what_leaves_the_bounds_is_brought_back():
    archetypes, _ = started(delta=0.5)
    with torch.no_grad():
        archetypes.weights += torch.randn(
            archetypes.weights.shape, generator=torch.Generator().manual_seed(0)
        )
        archetypes.weights[3] = -1.0
        archetypes.offset += 1.0
        archetypes.offset[4] = 0.01
    archetypes.hold()
    assert (archetypes.mixture >= 0).all()
    torch.testing.assert_close(archetypes.mixture.sum(1), torch.ones(N_FEATURES))
    assert (archetypes.mixture[3] == 1 / 8).all()
    lengths = archetypes.offset.detach().norm(dim=1)
    torch.testing.assert_close(lengths[:4], torch.full((4,), 0.5))
    assert float(lengths[4]) == pytest.approx(0.01 * D_MODEL**0.5)


def test_no_room_keeps_the_decoder_in_the_hull():
    archetypes, _ = started(delta=0.0)
    with torch.no_grad():
        archetypes.offset += 1.0
    for _ in range(2):
        archetypes.hold()
        assert (archetypes.offset == 0).all()
    assert torch.isfinite(archetypes.rows()).all()


def test_too_few_tokens_are_refused():
    archetypes = Archetypes(ArchetypesConfig(n_centroids=8), n_features=4, d_model=D_MODEL)
    with pytest.raises(ConfigError, match=r"8 centroids cannot be found in 5 tokens.*at most"):
        archetypes.start(tokens(10)[0], seed=0)


@pytest.mark.parametrize(("n_centroids", "share"), [(8, 1.0), (32, 1.0), (64, 0.5), (128, 0.25)])
def test_more_centroids_learn_their_shares_more_slowly(n_centroids, share):
    """Adam's first step moves each weight by the rate, whatever its gradient."""
    archetypes, _ = started(n_centroids=n_centroids)
    torch.testing.assert_close(archetypes.mixture.sum(1), torch.ones(N_FEATURES))
    before = archetypes.mixture.detach()
    optimiser = torch.optim.Adam([archetypes.weights], lr=1e-3)
    torch.autograd.backward(archetypes.rows().sum())
    optimiser.step()
    moved = (archetypes.mixture.detach() - before).abs()
    assert float(moved.median()) == pytest.approx(1e-3 * share, rel=1e-2)
