import collections
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visae.activations.mixing import even_order, seeded, uneven_order

SIZES = {"n_images": st.integers(0, 30), "n_positions": st.integers(0, 12)}


@given(**SIZES, first=st.integers(0, 3), seed=st.integers(0, 99))
def test_an_even_order_has_every_token_once(n_images, n_positions, first, seed):
    positions = torch.arange(first, first + n_positions)
    order = even_order(n_images, positions, stride=20, generator=seeded(seed))
    wanted = {i * 20 + p for i in range(n_images) for p in positions.tolist()}
    assert sorted(order.tolist()) == sorted(wanted)


@given(**SIZES, seed=st.integers(0, 99))
def test_rounds_have_every_image_once_and_none_comes_back_soon(n_images, n_positions, seed):
    order = even_order(n_images, torch.arange(n_positions), stride=20, generator=seeded(seed))
    images = (order // 20).tolist()
    for number in range(n_positions):
        assert sorted(images[number * n_images : (number + 1) * n_images]) == list(range(n_images))
    last = {}
    for at, image in enumerate(images):
        assert at - last.get(image, -n_images) >= n_images // 2
        last[image] = at


def test_any_token_comes_first_about_equally_often():
    firsts, n_draws = collections.Counter(), 3000
    for seed in range(n_draws):
        order = even_order(4, torch.arange(5), stride=5, generator=seeded(seed))
        firsts.update(order[:2].tolist())
    expected = 2 * n_draws / 20
    chi_square = sum((firsts[token] - expected) ** 2 / expected for token in range(20))
    assert chi_square < 50  # 19 degrees of freedom: 5 standard deviations


def test_images_change_their_neighbours_from_round_to_round():
    order = even_order(64, torch.arange(100), stride=100, generator=seeded(0)) // 100
    rounds = order.view(100, 64).tolist()
    followers = {pair for images in rounds for pair in itertools.pairwise(images)}
    assert len(followers) > 3000  # of 4032 ordered pairs; a fixed order has 63


@given(st.data())
def test_an_uneven_order_has_every_chosen_token_once(data):
    shape = data.draw(st.tuples(st.integers(0, 8), st.integers(1, 6)))
    bits = data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1]))
    chosen = torch.tensor(bits[: shape[0] * shape[1]], dtype=torch.bool).view(shape)
    order = uneven_order(chosen, generator=seeded(data.draw(st.integers(0, 99))))
    assert sorted(order.tolist()) == chosen.flatten().nonzero().flatten().tolist()


def test_an_uneven_order_spreads_each_image_over_the_whole():
    counts = [3, 30, 60]
    chosen = torch.arange(60)[None] < torch.tensor(counts)[:, None]
    order = uneven_order(chosen, generator=seeded(1)) // 60
    for start in range(0, 93, 31):
        part = order[start : start + 31]
        for image, count in enumerate(counts):
            assert abs(int((part == image).sum()) - count / 3) <= 1.5


@pytest.mark.parametrize(
    "seeds", [((0, 1), (1, 0)), ((1,), (1, 1)), ((-1, 2), (2**40, 2)), ((3,), (3 + 2**32,))]
)
def test_different_numbers_seed_differently(seeds):
    first, second = (torch.rand(4, generator=seeded(*numbers)).tolist() for numbers in seeds)
    assert first != second
