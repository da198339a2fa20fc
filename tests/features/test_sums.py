import dataclasses

import pytest
import torch

from visae.features.places import TokenPlaces
from visae.features.sums import FeatureSums
from visae.models.layout import Layout
from visae.saes.codes import SparseCodes

LAYOUT = Layout(special=("cls",), grid=(3, 3))


def sums_of(dense, classes, n_classes, policy="all"):
    """The sums over dense activations (image, token, feature)."""
    places = TokenPlaces.of(LAYOUT, policy)
    codes = SparseCodes.from_dense(dense.flatten(0, 1))
    image_max = codes.max_per_image(places.n_tokens)
    return FeatureSums.of_shard(codes, image_max, places, classes, n_classes)


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 10, 4, generator=generator).clamp_min(0.0)
    values[..., 3] = 0.0
    return values


CLASSES = torch.tensor([0, 1, -1, 0, 2, 1, 0])


def test_the_sums_are_those_of_the_dense_activations(dense):
    sums = sums_of(dense, CLASSES, 3)
    exact = dense.double()
    patches = exact[:, 1:]
    border = torch.tensor([True, True, True, True, False, True, True, True, True])
    image_max = exact.amax(1)
    expected = {
        "n_tokens": 70,
        "n_images": 7,
        "n_tokens_active": (exact > 0).sum((0, 1)),
        "n_special_active": (exact[:, :1] > 0).sum((0, 1)),
        "n_border_active": (patches[:, border] > 0).sum((0, 1)),
        "total": exact.sum((0, 1)),
        "patch_square_total": patches.square().sum((0, 1)),
        "position_total": patches.sum(0).T,
        "largest": dense.amax((0, 1)),
        "n_images_active": (image_max > 0).sum(0),
        "class_images": torch.stack(
            [(image_max[torch.eq(CLASSES, c)] > 0).sum(0) for c in range(3)], dim=1
        ),
        "class_weight": torch.stack(
            [image_max[torch.eq(CLASSES, c)].sum(0) for c in range(3)], dim=1
        ),
    }
    assert set(expected) == {field.name for field in dataclasses.fields(FeatureSums)}
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(getattr(sums, name)), torch.as_tensor(value))


def test_the_sums_of_shards_add_up(dense):
    whole = sums_of(dense, CLASSES, 3)
    parts = FeatureSums.zero(4, 9, 3)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        parts = parts.plus(sums_of(dense[part], CLASSES[part], 3))
    for field in dataclasses.fields(FeatureSums):
        one, other = getattr(whole, field.name), getattr(parts, field.name)
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_an_empty_shard_adds_nothing(dense):
    sums = sums_of(dense, CLASSES, 3)
    more = sums.plus(sums_of(dense[:0], CLASSES[:0], 3))
    assert more.n_images == 7
    assert torch.equal(more.position_total, sums.position_total)


def test_special_tokens_alone_have_no_positions(dense):
    sums = sums_of(dense[:, :1], CLASSES, 3, policy="special")
    assert sums.position_total.shape == (4, 0)
    assert torch.equal(sums.n_special_active, sums.n_tokens_active)


def test_images_without_labels_count_for_no_class(dense):
    sums = sums_of(dense, torch.full((7,), -1), 0)
    assert sums.class_images.shape == (4, 0)
    assert sums.n_images_active.tolist() == (dense.amax(1) > 0).sum(0).tolist()
