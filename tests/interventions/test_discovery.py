"""Discovery: profiles against dense arithmetic, and a selection that sees its own images only."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from visae.errors import ExperimentError, FeatureIndexError
from visae.features.build import build_index
from visae.features.config import IndexConfig
from visae.interventions.discovery import (
    Profiles,
    confirmation_precision,
    live_precision,
    matched_features,
    profile_features,
    select,
)
from visae.interventions.spec import BestForClass, FixedFeature
from visae.saes.checkpoint import read_sae_record
from visae.saes.codes import SparseCodes
from visae.saes.config import SAEConfig
from visae.saes.sae import SAE
from visae.saes.sparsity import ReLU

SITE = "residual@0"


@pytest.fixture(scope="module")
def sides(planted_lab):
    found = planted_lab.store.images.sides()
    return {
        side: [row for row, s in enumerate(found) if s == side]
        for side in ("discovery", "confirmation")
    }


@pytest.fixture(scope="module")
def profiles(planted_lab, sides):
    lab = planted_lab
    return profile_features(lab.sae, lab.store, SITE, "patches", sides["discovery"])


@pytest.fixture(scope="module")
def sha(planted_lab):
    return read_sae_record(planted_lab.sae_dir).weights.sha256


def labels_of(lab, rows):
    return [lab.store.images.labels[row] for row in rows]


def identity_sae(d_model):
    """Features are the activations themselves, above zero."""
    sae = SAE(SAEConfig(d_model=d_model, n_features=d_model, sparsity=ReLU(l1=0.0)))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d_model))
        sae.W_dec.copy_(torch.eye(d_model))
    return sae.requires_grad_(False)


def test_profiles_are_the_dense_statistics_of_the_discovery_images(planted_lab, sides, profiles):
    lab = planted_lab
    x = torch.cat([shard.activations for shard in lab.store.shards(SITE, "patches")])
    dense = lab.sae.encode(x[sides["discovery"]].flatten(0, 1)).numpy().astype(np.float64)
    per_image = dense.reshape(len(sides["discovery"]), 16, -1)
    assert profiles.rows == tuple(sides["discovery"])
    assert np.allclose(profiles.image_max.dense().numpy(), per_image.max(1))
    for feature in range(lab.n_features - 1):
        values = dense[:, feature][dense[:, feature] > 0]
        found = profiles.of(feature)
        assert found.density == pytest.approx(len(values) / len(dense))
        assert found.mean_active == pytest.approx(values.mean(), rel=1e-6)
        assert found.maximum == pytest.approx(values.max())
        for name, q in (("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            assert found.unit(name) == pytest.approx(np.quantile(values, q), rel=1e-6)
        assert found.unit("raw") == 1.0
        assert found.unit("max") == found.maximum
    ids = lab.store.images.content_ids
    assert profiles.image_ids == tuple(ids[row] for row in sides["discovery"])


def test_a_feature_that_fires_once_has_that_value_everywhere(store_of, tmp_path):
    table = torch.zeros(4, 3, 2)
    table[2, 1, 0] = 0.75
    table[:, :, 1] = 1.0
    store = store_of(tmp_path / "s", {"a@0": table})
    found = profile_features(identity_sae(2), store, "a@0", "patches", [3, 2, 0, 1]).of(0)
    assert (found.q50, found.q90, found.q99, found.maximum) == (0.75,) * 4
    assert found.density == pytest.approx(1 / 12)


def test_profiles_come_in_the_order_of_the_rows_whatever_order_is_given(planted_lab, sides):
    lab = planted_lab
    backwards = profile_features(lab.sae, lab.store, SITE, "patches", sides["discovery"][::-1])
    assert backwards.rows == tuple(sides["discovery"])


def test_there_must_be_images(planted_lab):
    with pytest.raises(ExperimentError, match="no discovery images"):
        profile_features(planted_lab.sae, planted_lab.store, SITE, "patches", [])


def test_the_planted_feature_is_chosen(planted_lab, sides, profiles, sha):
    labels = labels_of(planted_lab, sides["discovery"])
    found = select(BestForClass(class_name="red"), profiles, labels, sae_sha256=sha)
    assert found.feature == 0
    assert found.score == pytest.approx(1.0)
    assert found.n_candidates == planted_lab.n_features - 1
    assert found.image_ids == profiles.image_ids
    assert found.problem == ""
    assert select(BestForClass(class_name="blue"), profiles, labels, sae_sha256=sha).feature == 1


def test_scores_are_sklearns_average_precision(planted_lab, sides, profiles, sha):
    labels = labels_of(planted_lab, sides["discovery"])
    targets = [label == "red" for label in labels]
    dense = profiles.image_max.dense().numpy()
    scores = [
        average_precision_score(targets, dense[:, feature]) if dense[:, feature].any() else -1
        for feature in range(planted_lab.n_features)
    ]
    order = np.argsort(scores)[::-1]
    found = select(BestForClass(class_name="red"), profiles, labels, sae_sha256=sha)
    assert [found.feature, found.runner_up] == order[:2].tolist()
    assert found.score == pytest.approx(scores[order[0]])
    assert found.runner_up_score == pytest.approx(scores[order[1]])


def test_images_without_a_label_do_not_count_in_a_selection(planted_lab, profiles, sides, sha):
    labels = labels_of(planted_lab, sides["discovery"])
    labels[:3] = [None] * 3
    dense = profiles.image_max.dense()[3:]
    kept = dataclasses.replace(
        profiles, image_max=SparseCodes.from_dense(dense), rows=profiles.rows[3:]
    )
    rule = BestForClass(class_name="red")
    with_none = select(rule, profiles, labels, sae_sha256=sha)
    without = select(rule, kept, labels[3:], sae_sha256=sha)
    assert with_none.runner_up_score == without.runner_up_score


def image_profiles(image_max):
    """Profiles of features known by their largest activation on each image (image, feature)."""
    alive = (image_max > 0).any(0)
    return Profiles(
        rows=tuple(range(len(image_max))),
        image_ids=tuple(f"{i}" for i in range(len(image_max))),
        image_max=SparseCodes.from_dense(image_max),
        density=alive.double() * 0.1,
        mean_active=alive.double(),
        sorted_values=torch.ones(int(alive.sum())),
        starts=torch.cat([torch.zeros(1).long(), alive.long().cumsum(0)]),
    )


def test_a_feature_that_never_fires_is_never_chosen():
    """Ranking by a silent feature is chance; a live one that avoids the class does worse."""
    image_max = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    labels = ["other", "other", "mine", "mine"]
    profiles = image_profiles(image_max)
    found = select(BestForClass(class_name="mine"), profiles, labels, sae_sha256="")
    assert found.feature == 1
    assert (found.runner_up, found.runner_up_score) == (None, None)
    scores = live_precision(profiles, torch.tensor([1, 1, 0, 0]), 2)
    assert scores[0].tolist() == [-1.0, -1.0]
    with pytest.raises(ExperimentError, match="No feature fires"):
        select(
            BestForClass(class_name="mine"),
            image_profiles(torch.zeros(4, 2)),
            labels,
            sae_sha256="",
        )


def test_of_equal_features_the_first_is_chosen():
    image_max = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = select(
        BestForClass(class_name="a"), image_profiles(image_max), ["a", "b", "b"], sae_sha256=""
    )
    assert (found.feature, found.runner_up) == (1, 2)


def test_a_selection_cannot_see_the_confirmation_images(store_of, tmp_path, sides):
    """Labels and activations of confirmation images changed at will: the same choice, bit for bit.

    Changing the discovery images instead changes it, so that the test could fail.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 3, 6, generator=generator)
    labels = [("a", "b", "c")[i % 3] for i in range(60)]
    plain = store_of(tmp_path / "plain", {"a@0": table}, labels=labels)
    on_confirmation = torch.tensor([s == "confirmation" for s in plain.images.sides()])
    assert 10 < int(on_confirmation.sum()) < 50

    def choose(name, changed):
        other = torch.where(changed[:, None, None], table.flip(0) * 50, table)
        turned = {"a": "b", "b": "c", "c": "a"}
        pairs = zip(changed.tolist(), labels, strict=True)
        relabelled = [turned[label] if hit else label for hit, label in pairs]
        store = store_of(tmp_path / name, {"a@0": other}, labels=relabelled)
        rows = [i for i, s in enumerate(store.images.sides()) if s == "discovery"]
        profiles = profile_features(identity_sae(6), store, "a@0", "patches", rows)
        chosen = [
            select(
                BestForClass(class_name=name),
                profiles,
                [store.images.labels[row] for row in rows],
                sae_sha256="",
            )
            for name in "abc"
        ]
        matched = matched_features(profiles, 2, 3)
        return [(c.feature, c.score, c.image_ids) for c in chosen], matched, profiles.density

    before, matched, density = choose("none", torch.zeros(60).bool())
    after, matched_after, density_after = choose("confirmation", on_confirmation)
    assert before == after
    assert matched == matched_after
    assert torch.equal(density, density_after)
    assert choose("discovery", ~on_confirmation)[0] != before


def test_a_class_without_discovery_images_is_refused_with_the_nearest(profiles, planted_lab, sha):
    labels = ["red"] * len(profiles.rows)
    with pytest.raises(ExperimentError, match="No discovery image has the label rad") as caught:
        select(BestForClass(class_name="rad"), profiles, labels, sae_sha256=sha)
    assert caught.value.fix == "Use one of: red"


def test_a_fixed_feature_must_exist_and_fire(planted_lab, profiles, sha):
    labels = [None] * len(profiles.rows)
    for feature, said in ((24, "no feature 24"), (-1, "no feature -1"), (23, "never fires")):
        with pytest.raises(ExperimentError, match=said):
            select(FixedFeature(feature=feature), profiles, labels, sae_sha256=sha)


def test_a_fixed_feature_without_a_source_is_exploratory(profiles, sha):
    found = select(FixedFeature(feature=5), profiles, [], sae_sha256=sha)
    assert "does not say from which images" in found.problem
    assert (found.feature, found.n_candidates, found.score) == (5, 1, None)


@pytest.mark.parametrize("side", ["all", "discovery"])
def test_a_feature_chosen_from_an_index_has_seen_its_images(
    planted_lab, profiles, sides, sha, tmp_path, side
):
    lab = planted_lab
    build_index(lab.sae_dir, lab.store, tmp_path / "index", config=IndexConfig(side=side))
    rule = FixedFeature(feature=5, chosen_from=tmp_path / "index")
    found = select(rule, profiles, [], sae_sha256=sha)
    expected = sides["discovery"] if side == "discovery" else range(lab.store.n_images)
    assert found.image_ids == tuple(lab.store.images.content_ids[row] for row in expected)
    assert found.problem == ""
    with pytest.raises(ExperimentError, match="index of another SAE"):
        select(rule, profiles, [], sae_sha256="f" * 64)


def test_an_index_that_is_not_there(profiles, sha, tmp_path):
    rule = FixedFeature(feature=5, chosen_from=tmp_path)
    with pytest.raises(FeatureIndexError, match="no feature index"):
        select(rule, profiles, [], sae_sha256=sha)


def test_matched_features_are_the_nearest_live_ones():
    generator = np.random.default_rng(0)
    density = torch.tensor(generator.lognormal(-3, 1, 40).clip(0, 1))
    mean = torch.tensor(generator.lognormal(0, 0.5, 40))
    density[7] = mean[7] = 0.0
    profiles = dataclasses.replace(
        image_profiles(torch.ones(2, 40)), density=density, mean_active=mean
    )
    found = matched_features(profiles, 3, 10)
    alive = [f for f in range(40) if f not in (3, 7)]
    logs = np.log(np.stack([density.numpy()[alive], mean.numpy()[alive]], 1))
    own = np.log([float(density[3]), float(mean[3])])
    distance = (((logs - own) / logs.std(0)) ** 2).sum(1) ** 0.5
    assert found == [alive[i] for i in np.argsort(distance)[:10]]
    assert not {3, 7} & set(matched_features(profiles, 3, 38))
    with pytest.raises(ExperimentError, match="38 other features fire"):
        matched_features(profiles, 3, 39)


def test_one_other_live_feature_is_a_match():
    profiles = image_profiles(torch.tensor([[1.0, 1.0, 0.0]] * 2))
    assert matched_features(profiles, 0, 1) == [1]


def test_precision_on_confirmation_is_sklearns(planted_lab, sides):
    lab = planted_lab
    provenance = read_sae_record(lab.sae_dir).provenance
    rows = sides["confirmation"]
    x = torch.cat([s.activations for s in lab.store.shards(SITE, "patches")])[rows]
    largest = lab.sae.encode(x.flatten(0, 1)).reshape(len(rows), 16, -1).max(1).values
    targets = [label == "red" for label in labels_of(lab, rows)]
    for feature in (0, 5):
        found, share = confirmation_precision(lab.sae, lab.store, provenance, feature, rows, "red")
        assert found == pytest.approx(average_precision_score(targets, largest[:, feature]))
        assert share == pytest.approx(np.mean(targets))
    none = confirmation_precision(lab.sae, lab.store, provenance, 0, rows, "green")
    assert none == (None, None)
