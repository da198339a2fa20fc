import math

import numpy as np
import pytest
import torch

from visae.features.places import TokenPlaces
from visae.features.statistics import (
    border_lift,
    class_associations,
    flags,
    label_entropy,
    position_r2,
    special_share,
)
from visae.features.sums import FeatureSums
from visae.models.layout import Layout
from visae.saes.codes import SparseCodes

PLACES = TokenPlaces.of(Layout(special=("cls",), grid=(4, 4)), "all")


def sums_of(dense, classes=None, n_classes=0, places=PLACES):
    codes = SparseCodes.from_dense(dense.flatten(0, 1))
    if classes is None:
        classes = torch.full((dense.shape[0],), -1)
    image_max = codes.max_per_image(places.n_tokens)
    return FeatureSums.of_shard(codes, image_max, places, classes, n_classes)


def random_dense(n_images=30, n_features=5, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(n_images, 17, n_features, generator=generator) - 0.5
    return dense.clamp_min(0.0)


def test_label_entropy_is_that_of_the_weighted_classes():
    dense, classes = random_dense(), torch.arange(30) % 3
    found = label_entropy(sums_of(dense, classes, 3))
    for feature in range(5):
        weight = [float(dense[classes == c, :, feature].amax(1).sum()) for c in range(3)]
        share = [w / sum(weight) for w in weight]
        expected = -sum(p * math.log2(p) for p in share if p > 0)
        assert found[feature] == pytest.approx(expected, rel=1e-6)


def test_label_entropy_of_one_class_is_zero_and_of_a_constant_feature_is_full():
    classes = torch.arange(8) % 4
    dense = torch.zeros(8, 17, 3)
    dense[classes == 2, 0, 0] = 2.5
    dense[:, 3, 1] = 1.0
    entropy = label_entropy(sums_of(dense, classes, 4))
    assert entropy[0] == 0.0
    assert not np.signbit(entropy[0])
    assert entropy[1] == pytest.approx(2.0)
    assert np.isnan(entropy[2])


def test_label_entropy_without_labels_is_unknown():
    assert np.isnan(label_entropy(sums_of(random_dense()))).all()


def test_lift_is_how_much_more_common_the_class_is_among_active_images():
    classes = torch.tensor([0] * 20 + [1] * 60)
    dense = torch.zeros(80, 17, 1)
    dense[:15, 2, 0] = 1.0  # 15 images of class 0
    dense[20:25, 2, 0] = 1.0  # 5 images of class 1
    found = class_associations(sums_of(dense, classes, 2), np.array([20, 60]))
    assert found.classes[0].tolist() == [0, -1]
    assert found.lifts[0, 0] == pytest.approx((15 / 20) / (20 / 80))
    assert found.counts[0].tolist() == [15, 0]


def test_few_images_do_not_beat_many():
    classes = torch.tensor([0] * 50 + [1] * 50)
    dense = torch.zeros(100, 17, 3)
    dense[:2, 0, 0] = 1.0  # two images: too few for any class
    dense[:, 0, 1] = 1.0  # fires always: no class stands out
    dense[:40, 0, 2] = 1.0
    found = class_associations(sums_of(dense, classes, 2), np.array([50, 50]))
    assert found.classes[:, 0].tolist() == [-1, -1, 0]
    assert np.isnan(found.lifts[:2, 0]).all()


def test_classes_are_ranked_by_the_lower_end_of_the_interval():
    classes = torch.tensor([0] * 3 + [1] * 60 + [2] * 200)
    dense = torch.zeros(263, 17, 1)
    dense[:63, 0, 0] = 1.0  # all of classes 0 and 1
    found = class_associations(sums_of(dense, classes, 3), np.array([3, 60, 200]))
    p = np.array([3 / 63, 60 / 63])
    centre, half = p + 1.96**2 / 126, 1.96 * np.sqrt(p * (1 - p) / 63 + 1.96**2 / (4 * 63**2))
    lower = (centre - half) / (1 + 1.96**2 / 63) / np.array([3 / 263, 60 / 263])
    assert lower[0] > 1
    assert lower[1] > lower[0]
    assert found.classes[0].tolist() == [1, 0, -1]
    assert found.lifts[0, 0] == pytest.approx(found.lifts[0, 1])


def test_labels_at_random_give_no_class_more_often_than_intervals_miss():
    generator = torch.Generator().manual_seed(0)
    dense = (torch.rand(200, 1, 400, generator=generator) < 0.2).float()
    classes = torch.randint(0, 4, (200,), generator=generator)
    places = TokenPlaces.of(Layout(special=("cls",), grid=(1, 1)), "special")
    sums = sums_of(dense, classes, 4, places)
    found = class_associations(sums, torch.bincount(classes, minlength=4).numpy())
    assert (found.classes[:, 0] >= 0).mean() < 0.2  # 4 classes × 2.5 % and some for discreteness


def test_position_r2_is_the_between_position_share_of_variance():
    dense = random_dense()
    dense[:, 5, 1] += 2.0
    found = position_r2(sums_of(dense), PLACES)
    patches = dense[:, 1:].double()
    between = patches.mean(0).var(0, correction=0)
    whole = patches.flatten(0, 1).var(0, correction=0)
    np.testing.assert_allclose(found, (between / whole).numpy(), rtol=1e-6)
    assert found[1] > 0.3


def test_position_r2_of_a_feature_that_is_its_position_is_one():
    dense = torch.zeros(6, 17, 3)
    dense[:, 4, 0] = 1.5
    dense[:, 1:, 1] = 1.5  # constant: nothing to explain
    found = position_r2(sums_of(dense), PLACES)
    assert found[0] == pytest.approx(1.0)
    assert np.isnan(found[1:]).all()


def test_border_lift_compares_with_the_share_of_border_patches():
    dense = torch.zeros(10, 17, 4)
    dense[:, 1, 0] = 1.0  # patch 0, a corner
    dense[:, 6, 1] = 1.0  # patch 5, inside
    dense[:, 1:, 2] = 1.0
    found = border_lift(sums_of(dense), PLACES)
    np.testing.assert_allclose(found, [16 / 12, 0.0, 1.0, np.nan])


def test_flags_name_what_is_suspicious():
    dense = torch.zeros(40, 17, 7)
    dense[:, 4, 1] = 1.0  # one border position in every image
    dense[torch.arange(40), torch.arange(40) % 12 + 1, 2] = 1.0
    dense[:, 0, 3] = 1.0  # the class token
    dense[:, 1:9, 4] = 1.0  # half the patches
    dense[:3, 6, 5] = 1.0  # too few to judge
    dense[::7, 6, 6] = 1.0
    found = flags(sums_of(dense), PLACES)
    named = [[name for name, column in found.items() if column[f]] for f in range(7)]
    assert named == [
        ["dead"],
        ["position", "border"],
        [],
        ["special"],
        ["dense", "position"],
        [],
        [],
    ]


def test_special_share_needs_special_tokens():
    dense = torch.zeros(4, 17, 2)
    dense[:, 0, 0] = 1.0
    dense[:2, 3, 0] = 1.0
    np.testing.assert_allclose(special_share(sums_of(dense), PLACES), [4 / 6, np.nan])
    patches = TokenPlaces.of(Layout(special=("cls",), grid=(4, 4)), "patches")
    alone = sums_of(dense[:, 1:], places=patches)
    assert np.isnan(special_share(alone, patches)).all()


def test_without_patches_nothing_is_said_of_places():
    places = TokenPlaces.of(Layout(special=("cls",), grid=(4, 4)), "special")
    sums = sums_of(torch.ones(30, 1, 2), places=places)
    assert np.isnan(position_r2(sums, places)).all()
    assert np.isnan(border_lift(sums, places)).all()
    assert not flags(sums, places)["special"].any()
