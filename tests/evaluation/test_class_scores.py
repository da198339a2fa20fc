import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from visae.evaluation.class_scores import (
    FIGURES,
    LabelledImages,
    class_probe,
    label_images,
    permuted_figures,
    permuted_labels,
)
from visae.evaluation.config import EvaluateConfig
from visae.evaluation.probes import average_precision
from visae.images.catalog import ImageTable
from visae.saes.codes import SparseCodes

CONFIG = EvaluateConfig(n_permutations=40)


def table(labels, groups=None) -> ImageTable:
    n = len(labels)
    return ImageTable(
        content_ids=tuple(f"image-{i}" for i in range(n)),
        refs=tuple(map(str, range(n))),
        labels=tuple(labels),
        groups=tuple(groups or [None] * n),
    )


def labels_of(n_images: int, seed: int = 0) -> list[str]:
    return [f"class {c}" for c in np.random.default_rng(seed).integers(0, 4, n_images)]


@pytest.fixture
def labelled() -> LabelledImages:
    return label_images(table(labels_of(200)), CONFIG)


def codes_marking(labelled: LabelledImages, strengths: dict[int, float], n_features: int = 12):
    """Codes whose feature j marks class j with some strength, the others at random."""
    rng = np.random.default_rng(5)
    dense = rng.random((len(labelled.rows), n_features)) * (
        rng.random((len(labelled.rows), n_features)) < 0.3
    )
    for feature, strength in strengths.items():
        dense[:, feature] += strength * (labelled.classes == feature)
    return SparseCodes.from_dense(torch.tensor(dense))


def test_the_sides_are_those_of_the_image_table(labelled):
    images = table(labels_of(200))
    expected = [side == "confirmation" for side in images.sides()]
    assert labelled.confirms.tolist() == expected
    assert labelled.names == images.classes
    assert labelled.scored == (0, 1, 2, 3)
    assert labelled.left_out == ()


def test_unlabelled_images_are_left_out_and_the_rest_spread_evenly():
    names = [None if i % 3 else f"class {i % 2}" for i in range(120)]
    everything = label_images(table(names), CONFIG)
    assert everything.rows.tolist() == list(range(0, 120, 3))
    few = label_images(table(names), dataclasses.replace(CONFIG, n_class_images=10))
    assert few.rows.tolist() == list(range(0, 120, 12))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([None] * 30, "no labels"),
        ([], "no labels"),
        (["ant"] * 30, "one class, ant"),
        (["ant", "bee"], "no class has 2 images"),
    ],
)
def test_what_cannot_be_scored_says_why(labels, problem):
    assert problem in label_images(table(labels), CONFIG).problem


def test_a_class_with_too_few_images_is_left_out():
    found = label_images(table([*(["ant", "bee"] * 30), "cat"]), CONFIG)
    assert found.problem == ""
    assert found.left_out == ("cat",)
    assert found.scored == (0, 1)


def test_features_are_chosen_on_discovery_and_scored_on_confirmation(labelled):
    codes = codes_marking(labelled, {0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0})
    dense = codes.dense().numpy().copy()
    rng = np.random.default_rng(6)
    # Feature 8 marks class 0 on the discovery images alone, and better than feature 0 does.
    dense[:, 0] += 5.0 * (rng.random(200) < 0.1)
    dense[:, 8] = np.where(labelled.confirms, rng.random(200), 9.0 * (labelled.classes == 0))
    # Feature 9 marks class 1 on the confirmation images alone.
    dense[:, 1] += 5.0 * (rng.random(200) < 0.1)
    dense[:, 9] = np.where(labelled.confirms, 9.0 * (labelled.classes == 1), rng.random(200))
    probe = class_probe(SparseCodes.from_dense(torch.tensor(dense)), labelled)
    chosen = probe.choose(labelled.classes[~labelled.confirms])
    assert chosen.features.tolist() == [8, 1, 2, 3]
    assert chosen.precision[0] == 1
    confirmation = labelled.classes[labelled.confirms]
    weights = np.ones((1, len(confirmation)))
    average = probe.score(chosen.features, confirmation, weights, n_top=16)[0, :, 0]
    expected = average_precision(
        SparseCodes.from_dense(torch.tensor(dense[labelled.confirms])),
        torch.tensor(confirmation),
        4,
    )
    np.testing.assert_allclose(average, expected[[8, 1, 2, 3], range(4)])
    assert average[0] < 0.5


def test_the_figures_are_means_over_classes(labelled):
    probe = class_probe(codes_marking(labelled, {0: 5.0, 1: 0.3}), labelled)
    chosen = probe.choose(labelled.classes[~labelled.confirms]).features
    confirmation = labelled.classes[labelled.confirms]
    weights = np.ones((1, len(confirmation)))
    average, top = probe.score(chosen, confirmation, weights, n_top=16)
    found = probe.figures(chosen, confirmation, weights, config=CONFIG)
    assert found[:, 0].tolist() == pytest.approx(
        [average.mean(), (average >= 0.3).mean(), top.mean()]
    )
    assert len(found) == len(FIGURES)


def test_choosing_in_chunks_of_features_changes_nothing(labelled, monkeypatch):
    codes = codes_marking(labelled, {0: 1.0, 3: 0.5})
    whole = class_probe(codes, labelled)
    monkeypatch.setattr("visae.evaluation.class_scores._CHUNK_ELEMENTS", 20)
    chunked = class_probe(codes, labelled)
    assert len(chunked.discovery) == 3
    classes = labelled.classes[~labelled.confirms]
    for a, b in zip(whole.choose(classes), chunked.choose(classes), strict=True):
        assert a.tolist() == b.tolist()


def test_permuted_labels_score_at_chance_and_planted_ones_far_above(labelled):
    probe = class_probe(codes_marking(labelled, dict.fromkeys(range(4), 5.0)), labelled)
    draws = permuted_figures(probe, config=CONFIG)
    assert draws.shape == (3, 40)
    assert draws[0].mean() == pytest.approx(1 / 4, abs=0.04)
    assert draws[2].mean() == pytest.approx(1 / 4, abs=0.06)
    classes = labelled.classes
    chosen = probe.choose(classes[~labelled.confirms]).features
    weights = np.ones((1, int(labelled.confirms.sum())))
    own = probe.figures(chosen, classes[labelled.confirms], weights, config=CONFIG)[:, 0]
    assert own[0] > draws[0].max() + 0.3


def test_codes_without_meaning_are_beyond_all_permutations_as_often_as_chance_says():
    labelled = label_images(table([f"class {i % 2}" for i in range(60)]), CONFIG)
    config, beyond = dataclasses.replace(CONFIG, n_permutations=20), 0
    confirmation = labelled.classes[labelled.confirms]
    weights = np.ones((1, len(confirmation)))
    for seed in range(40):
        dense = torch.tensor(np.random.default_rng(seed).random((60, 8)) - 0.5).clamp_min(0)
        probe = class_probe(SparseCodes.from_dense(dense), labelled)
        chosen = probe.choose(labelled.classes[~labelled.confirms]).features
        own = probe.figures(chosen, confirmation, weights, config=config)[0, 0]
        beyond += own > permuted_figures(probe, config=config)[0].max()
    low, high = stats.binom.interval(0.95, 40, 1 / 21)
    assert low <= beyond <= high


def test_permuting_keeps_the_number_of_images_of_each_class():
    classes = np.array([0, 0, 0, 1, 1, 2])
    found = {
        tuple(permuted_labels(classes, np.arange(6), np.random.default_rng(seed)).tolist())
        for seed in range(200)
    }
    assert {tuple(sorted(labels)) for labels in found} == {(0, 0, 0, 1, 1, 2)}
    assert len(found) > 50  # of 60 different orders


def test_groups_of_equal_size_exchange_their_labels_whole():
    units = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    classes = np.array([5, 6, 7, 5, 6, 7, 5, 6, 7])
    found = set()
    for seed in range(40):
        labels = permuted_labels(classes, units, np.random.default_rng(seed))
        assert labels[:3].tolist() * 3 == labels.tolist()
        found.add(tuple(labels[:3].tolist()))
    assert len(found) == 6


def test_labels_that_follow_groups_are_permuted_by_group():
    """A feature that marks groups is no evidence of classes, and the permutations know it."""
    groups = [f"group {i // 10}" for i in range(200)]
    images = table([f"class {(i // 10) % 2}" for i in range(200)], groups)
    labelled = label_images(images, CONFIG)
    of_group = np.random.default_rng(0).random((20, 30))
    codes = SparseCodes.from_dense(torch.tensor(of_group[np.arange(200) // 10]))
    draws = permuted_figures(class_probe(codes, labelled), config=CONFIG)[0]
    alone = dataclasses.replace(labelled, units=np.arange(200))
    independent = permuted_figures(class_probe(codes, alone), config=CONFIG)[0]
    assert draws.std() > 2 * independent.std()
