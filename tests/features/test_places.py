import pytest
import torch

from visae.features.places import TokenPlaces
from visae.models.layout import Layout

LAYOUT = Layout(special=("cls", "register0"), grid=(3, 4))


@pytest.mark.parametrize(
    ("policy", "n_tokens", "n_special", "grid"),
    [("all", 14, 2, (3, 4)), ("patches", 12, 0, (3, 4)), ("special", 2, 2, (0, 0))],
)
def test_a_policy_keeps_some_tokens(policy, n_tokens, n_special, grid):
    places = TokenPlaces.of(LAYOUT, policy)
    assert (places.n_tokens, places.n_special, places.grid) == (n_tokens, n_special, grid)


def test_patches_are_counted_in_each_image_from_the_first_patch():
    places = TokenPlaces.of(LAYOUT, "all")
    tokens = torch.tensor([0, 1, 2, 13, 14, 16])
    assert places.patch_of(tokens).tolist() == [-2, -1, 0, 11, -2, 0]


def test_the_border_is_the_outermost_patches():
    border = TokenPlaces.of(LAYOUT, "patches").is_border.view(3, 4)
    assert border.tolist() == [[True] * 4, [True, False, False, True], [True] * 4]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (5, 2)])
def test_a_thin_grid_is_all_border(grid):
    layout = Layout(special=(), grid=grid)
    assert TokenPlaces.of(layout, "patches").is_border.all()


def test_without_patches_there_is_no_border():
    assert TokenPlaces.of(LAYOUT, "special").is_border.shape == (0,)
